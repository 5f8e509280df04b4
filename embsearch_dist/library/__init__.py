"""Searches around models that are not ours: a supernet of the user's own tables, and widths by his own score."""
