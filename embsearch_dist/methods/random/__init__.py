"""Random widths under a budget: what a budget is worth without a search. A baseline, and the smallest whole method."""
