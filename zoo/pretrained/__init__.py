"""The nano checkpoints that this repository trained, as data files in the published layout."""
