"""Zeros in the weights: which ones (SparseGPT), how many in each linear, and masks that hold them in training."""
