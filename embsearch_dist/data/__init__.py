"""From raw click logs to batches: formats -> prepare -> dataset."""
