"""Object stores: data and raw files fetched into a checked cache, run directories mirrored and brought back."""
