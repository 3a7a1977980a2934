"""What the project grew from: each public claim about V2 and R1, and what checks it."""

if __name__ != "deepzoo.seeds":  # a bare `import seeds` would make a second copy of every class
    raise ImportError(f"import this package as `deepzoo.seeds`, not as `{__name__}`")
