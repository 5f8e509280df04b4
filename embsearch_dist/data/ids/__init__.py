"""Parquet files with ids that another engine has made: checked, and taken over as they are."""
