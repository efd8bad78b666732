"""Round by round down to a goal (`compress`), and pruning inside the user's own `fit`.

`compression_run` is the algorithm, `preparation` checks a call, `callbacks` and `wrapper` prune inside `fit`.
Which units leave is decided in `plans/`, how models are cut and repaired is in `cutting/`, and what a run
reports is in `reports/`.
"""
