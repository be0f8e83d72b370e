"""Training: the dense model for its task, and pruned models back to the dense one's answers."""
