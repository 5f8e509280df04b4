"""Data of one's own in the place of prepared shards: what a source is, a ready one of tables, and names for others."""
