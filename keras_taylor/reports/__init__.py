"""What was removed, what was left and why: tables, curves, pictures, one HTML page."""
