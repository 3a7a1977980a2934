"""Models, weights, tokenizers and generation for the V2 and R1 families."""

if __name__ != "deepzoo.zoo":  # a bare `import zoo` would make a second copy of every class
    raise ImportError(f"import this package as `deepzoo.zoo`, not as `{__name__}`")
