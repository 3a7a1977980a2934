"""Training recipes: one file per recipe, read top to bottom; shared pieces lie in `parts`."""

if __name__ != "deepzoo.recipes":  # a bare `import recipes` would make a second copy of every class
    raise ImportError(f"import this package as `deepzoo.recipes`, not as `{__name__}`")
