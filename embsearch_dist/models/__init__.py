"""Models: tables -> transform to the common width -> backbone. They know nothing of methods."""
