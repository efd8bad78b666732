"""SavedModel, LiteRT, ONNX and Keras files: converted, run, compared, measured.

Sizes and times of these files become costs that a goal may limit in `keras_taylor.budget`. The command
`keras-taylor export` is in `keras_taylor.cli`. `keras_taylor.loop.backups` saves the state of a compression.
"""
