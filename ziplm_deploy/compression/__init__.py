"""What multiplies pruning: zeros in the weights and 8-bit integers."""
