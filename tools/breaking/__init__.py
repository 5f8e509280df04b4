"""What corruption.py and kills.py share: tiny runs of every method, made, broken and judged."""
