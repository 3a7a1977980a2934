"""Expert choice: scores, groups, top-k, weights."""
