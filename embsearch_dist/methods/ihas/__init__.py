"""iHAS (Yu et al. 2023): gates choose dimensions row by row, K-means groups rows, each group gets its own model."""
