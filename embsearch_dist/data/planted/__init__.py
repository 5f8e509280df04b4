"""Made-up clicks that hide a right answer."""
