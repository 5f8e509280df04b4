"""The checks behind tools/gpu_check.py. What the parent process imports (command, listing, runner, table, facts) is
free of torch: only the process of a check loads it."""
