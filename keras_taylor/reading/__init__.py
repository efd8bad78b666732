"""From any Keras model to one flat graph, and from there to groups of channels that leave together.

How one operation treats channels is said by its rule in `rules`. Private parts of Keras are read in
`support.keras_internals`. Gates are in `scores`, and smaller models are built in `cutting`.
"""
