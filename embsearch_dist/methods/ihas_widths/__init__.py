"""Groups of rows as iHAS finds them, and widths for all groups together under one budget.

The gates and the groups are those of `ihas/`. The widths are found as `utilities/` finds those of one model: the
widest model is trained on the rows of each group, each field of it is cut down on validation rows of its group, and one
exact knapsack chooses among all (group, field) pairs. It counts the tables of all groups together.
"""
