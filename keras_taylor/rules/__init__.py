"""What each kind of layer does to channels, and how it shrinks.

The table of rules is in `registry`, what a rule sees and returns in `base`. Models are read in `reading`.
"""
