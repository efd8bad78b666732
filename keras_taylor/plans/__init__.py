"""Which channels leave for a goal: order, floors, search; the plan as a value."""
