"""Round by round down to a goal (`compress`), and pruning inside the user's own `fit`."""
