"""A prepared data set on disk: Parquet shards, and the manifest that says what they hold."""
