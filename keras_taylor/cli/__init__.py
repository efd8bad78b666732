"""The command `keras-taylor`."""
