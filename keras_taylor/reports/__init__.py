"""What was removed, what was left and why: tables, curves, pictures, one HTML page.

The numbers come from `budget/` (costs), `scores/` (losses) and `exports/` (measured files). `loop/` fills
the record of a run, and `cli/` prints and writes it.
"""
