"""The house rules as functions from source text to complaints; tests/test_house.py applies them.

Each rule takes a parsed file and returns one line per offence, `<line>: <what and why>`. They are
approximations on the syntax tree: they catch the habit, not somebody determined to hide it.
"""

import ast
import sys
from collections.abc import Iterator

IMPORT_NAMES = {  # distribution -> import name, where the two differ
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
}
KERNEL_IMPORTS = frozenset({"jax", "jaxtyping", "ml_dtypes", "numpy"})
KERNEL_BASELINES = frozenset({"tokamax"})  # an implementation="tokamax" to compare with
PEERS = frozenset(
    {"torch", "transformers"}
)  # oracles: may be asked for inside a function, never needed
LAYERS = {
    "kernels": ("kernels",),
    "zoo": ("kernels", "zoo"),
    "recipes": ("kernels", "zoo", "recipes"),
    "seeds": ("kernels", "zoo", "recipes", "seeds"),
}

FORBIDDEN_NNX = frozenset(
    "jit grad value_and_grad scan vmap pmap remat split_rngs StateAxes StateSharding "
    "DiffState Optimizer cached_partial Cache BatchStat".split()
)
FORBIDDEN_IMPORTS = frozenset(
    "pickle cPickle _pickle dill cloudpickle joblib marshal shelve imp runpy".split()
)
FORBIDDEN_BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
FORBIDDEN_CALLS = frozenset(
    {"torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
)
FORBIDDEN_WORDS = frozenset({"allow_pickle", "trust_remote_code"})

GLOBAL_STATE_CALLS = frozenset(
    "jax.config.update flax.config.update jax.distributed.initialize os.putenv os.unsetenv "
    "os.environ.update os.environ.setdefault os.environ.pop os.environ.clear sys.path.append "
    "sys.path.insert warnings.filterwarnings warnings.simplefilter logging.basicConfig "
    "numpy.random.seed np.random.seed random.seed multiprocessing.set_start_method".split()
)
GLOBAL_STATE = ("os.environ", "jax.config", "flax.config", "sys.path")


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of attributes on a name, otherwise an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute dotted module, inside a function) of each import in a file of `package`."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[int, str, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, lazy
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:  # `from deepzoo import recipes` names a package, too
                yield node.lineno, f"{module}.{alias.name}", lazy
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(tree, False)


def imports_one_way(
    tree: ast.Module, package: str, core: frozenset[str], optional: frozenset[str]
) -> list[str]:
    """kernels <- zoo <- recipes <- seeds, and nothing that pyproject.toml does not declare.

    `package` is the file's own (`deepzoo.zoo.cli`); `core` and `optional` are import names.
    Optional ones and the peers are welcome inside functions only: importing the package must not
    need them.
    """
    layer = package.split(".")[1]
    if layer == "kernels":
        core, optional = core & KERNEL_IMPORTS, optional & KERNEL_BASELINES
    found = []
    for line, name, lazy in _imports(tree, package):
        top, _, rest = name.partition(".")
        if top == "deepzoo":
            target = rest.partition(".")[0]
            if target not in LAYERS[layer]:
                found.append(f"{line}: {layer} must not import deepzoo.{target}")
        elif top in sys.stdlib_module_names or top in core:
            continue
        elif top in optional or (top in PEERS and layer != "kernels"):
            if not lazy:
                found.append(
                    f"{line}: {top} is optional: import it inside the function that needs it"
                )
        else:
            found.append(f"{line}: {top} is not among what {layer} may import")
    return found


def _nnx_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names bound to the module flax.nnx, and names imported out of it."""
    modules, members = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "flax.nnx":
                    modules.add(alias.asname or "flax.nnx")
                elif alias.name == "flax":
                    modules.add(f"{alias.asname or 'flax'}.nnx")
        elif isinstance(node, ast.ImportFrom) and node.module == "flax":
            modules |= {a.asname or a.name for a in node.names if a.name == "nnx"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax.nnx"):
            members |= {a.name for a in node.names}
    return modules, members


def _root(node: ast.AST) -> str:
    """The name that a chain of attributes and subscripts starts from; empty for a bare name."""
    chained = False
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        node, chained = node.value, True
    return node.id if chained and isinstance(node, ast.Name) else ""


def _writes(function: ast.AST, name: str) -> Iterator[ast.AST]:
    """Places in `function` that store into or delete from the object called `name`."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute | ast.Subscript):
            if isinstance(node.ctx, ast.Store | ast.Del) and _root(node) == name:
                yield node
        elif isinstance(node, ast.Call) and dotted(node.func) in {
            "setattr",
            "delattr",
            "object.__setattr__",
        }:
            if node.args and dotted(node.args[0]) == name:
                yield node


def functional_flax(tree: ast.Module) -> list[str]:
    """NNX is the definition language, never a state container; its transforms are in flux."""
    modules, members = _nnx_names(tree)
    if not modules and not members:
        return []
    found = [f"1: nnx.{name} is not used here" for name in sorted(members & FORBIDDEN_NNX)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr in FORBIDDEN_NNX and dotted(node.value) in modules:
                found.append(
                    f"{node.lineno}: nnx.{node.attr} is not used here: use jax.*, state outside"
                )
            elif node.attr == "value":
                found.append(f"{node.lineno}: .value on a variable: use v[...] or v.get_value()")
        elif isinstance(node, ast.keyword) and node.arg == "out_sharding":
            found.append(f"{node.value.lineno}: out_sharding= needs a mesh to construct: use axes")
    bases = {f"{m}.Module" for m in modules} | (members & {"Module"})
    for cls in [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]:
        if not any(dotted(base) in bases for base in cls.bases):
            continue
        bases.add(cls.name)
        for method in cls.body:
            if isinstance(method, ast.FunctionDef) and method.args.args:
                found += _module_method(cls.name, method, modules)
    return found


def _module_method(cls: str, method: ast.FunctionDef, modules: set[str]) -> list[str]:
    """Complaints about one method of an nnx.Module: late writes, and random state kept."""
    me = method.args.args[0].arg
    if method.name != "__init__":
        return [
            f"{getattr(node, 'lineno', 0)}: {cls}.{method.name} writes to {me} outside __init__"
            for node in _writes(method, me)
        ]
    streams = {"rngs"} | {
        a.arg
        for a in [*method.args.args, *method.args.kwonlyargs]
        if a.annotation is not None and dotted(a.annotation) in {f"{m}.Rngs" for m in modules}
    }
    found = []
    for node in ast.walk(method):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        value = node.value
        kept = isinstance(value, ast.Name) and value.id in streams
        kept |= isinstance(value, ast.Call) and dotted(value.func) in {f"{m}.Rngs" for m in modules}
        if kept and any(_root(t) == me for t in targets):
            found.append(
                f"{node.lineno}: {cls} keeps an nnx.Rngs: randomness comes in as an argument"
            )
    return found


def no_code_from_data(tree: ast.Module) -> list[str]:
    """Nothing that turns data into running code."""
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            names = [a.name.partition(".")[0] for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
        else:
            names = []
        found += [f"{line}: import of {name}" for name in names if name in FORBIDDEN_IMPORTS]
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_BUILTINS or name in FORBIDDEN_CALLS:
                found.append(f"{line}: call of {name}")
            for keyword in node.keywords:
                if keyword.arg == "shell" and not _is_false(keyword.value):
                    found.append(f"{line}: shell=True")
        word = (
            getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
        )
        if word in FORBIDDEN_WORDS:
            found.append(f"{line}: {word}")
    return found


def _is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _import_time(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run at import: everything but the bodies of functions and the __main__ block."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).startswith("__name__ == "):
            continue
        yield child
        yield from _import_time(child)


def quiet_import(tree: ast.Module) -> list[str]:
    """Importing changes nothing for others in the process: settings, environment, search path."""
    found = []
    for node in _import_time(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in GLOBAL_STATE_CALLS or name.startswith("nnx.set_"):
                found.append(f"{line}: {name} at import")
        elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(
            node.ctx, ast.Store | ast.Del
        ):
            if dotted(node.value) in GLOBAL_STATE:
                found.append(f"{line}: {dotted(node.value)} is written at import")
    return found
