"""Search for a level of every module: the space, evaluation of plans, a surrogate, and the search itself."""
