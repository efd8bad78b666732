"""What is counted or measured of a model, and what a goal asks of it.

`costs` counts parameters, FLOPs and memory, and says how to add another cost; `measuring` measures files and
times. Which units leave for a goal is decided in `plans`, round by round in `loop`.
"""
