"""Tokens to experts and back: permutation and weighted sum."""
