"""Latent attention over whole prompts, with expanded heads."""
