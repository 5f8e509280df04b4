"""The two plainest ways from a trained model to widths: variance per field (FDO) and magnitude of columns."""
