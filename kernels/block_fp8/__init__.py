"""Products with float8 weights that carry one scale per 128 x 128 block."""
