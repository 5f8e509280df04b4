"""embsearch_dist: find how wide each categorical feature's embedding should be, then train that model."""

__version__ = "0.1.0"
