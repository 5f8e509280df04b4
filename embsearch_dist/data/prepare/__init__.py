"""From raw files to a prepared data set, by one process or a team."""
