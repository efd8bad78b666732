"""From any Keras model to one flat graph, and from there to groups of channels that leave together."""
