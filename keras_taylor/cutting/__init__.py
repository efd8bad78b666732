"""The smaller model that a plan describes, and its repair."""
