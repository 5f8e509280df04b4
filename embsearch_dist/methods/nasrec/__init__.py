"""NASRec (Zhang et al. 2023): a supernet of blocks of dense and sparse operators, searched by regularized evolution."""
