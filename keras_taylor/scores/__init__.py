"""Gates, the losses that feed them, and what makes a channel important."""
