"""Latent attention for one token per row, over the compressed cache."""
