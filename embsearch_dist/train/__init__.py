"""Training: one loop for every stage, exact metrics, checkpoints, and the monitor."""
