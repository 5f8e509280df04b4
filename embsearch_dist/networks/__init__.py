"""NASRec's networks: their spaces, canonical forms and costs, and what one computes from a supernet's slices."""
