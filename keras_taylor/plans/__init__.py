"""Which channels leave for a goal: order, floors, search; the plan as a value.

A user says in a `Selection` how units are chosen; `make_plan` makes a `Plan`. Scores come from `scores`,
goals and costs from `budget`; `cutting` builds the smaller model that a plan describes.
"""
