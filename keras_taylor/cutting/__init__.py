"""The smaller model that a plan describes, and its repair.

Plans are made in `plans`. How a layer shrinks is said by its rule in `rules`. The least squares that
repair solves are in `support.least_squares`; rounds of pruning and training are in `loop`.
"""
