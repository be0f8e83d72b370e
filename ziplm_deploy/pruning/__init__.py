"""One-shot structured pruning: moments, methods, the database of levels, the planner and its search."""
