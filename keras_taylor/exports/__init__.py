"""SavedModel, LiteRT, ONNX and Keras files: converted, run, compared, measured."""
