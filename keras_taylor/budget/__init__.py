"""What is counted or measured of a model, and what a goal asks of it."""
