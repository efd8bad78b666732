"""Helpers that know nothing of pruning: data, devices, optimizers, least squares, console, files, JSON.

Private parts of Keras are read in `keras_internals`, and nowhere else. `types` names the kinds of values that
functions pass to each other. What a layer does to channels is in `rules`.
"""
