"""Gates, the losses that feed them, and what makes a channel important.

The formulas are in `criteria`, the public verb in `scoring`. How scores lead to a plan is in `plans`, the
scores of the rounds of `compress` are in `loop`.
"""
