"""Width utilities: the widest model is trained once, and its fields are cut down on validation rows."""
