"""One-shot structured pruning: order of removal (obs), levels, database, baselines, and the search over levels."""
