"""UES: the same width for every field. The baseline of every report, through the same path as the rest."""
