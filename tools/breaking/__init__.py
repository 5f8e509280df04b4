"""What tools/corruption.py and tools/kills.py share: tiny runs of every method, made, broken and judged."""
