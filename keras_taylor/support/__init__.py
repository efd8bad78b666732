"""What knows nothing of pruning: data in any form, devices, optimizers, least squares, progress, files."""
