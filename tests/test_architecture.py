"""The rules of the house, checked on the source: layers, sizes, and what is not written here."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import spectral_surgery

PACKAGE = Path(spectral_surgery.__file__).parent
LAYERS = (
    {
        "after_import",
        "ahead",
        "errors",
        "registry",
        "options",
        "targets",
        "memory",
        "progress",
        "plotting",
        "pool",
        "run",
        "distributed",
    },
    {"transforms", "kernels", "gpu"},
    {"codec"},
    {"sparse"},
    {"baselines", "matmul", "fourier", "causal_conv"},
    {"layers", "adapters", "mixers"},
    {"files", "live"},
    {"hub", "hf"},
    {"text", "engines"},
    {"inputs"},
    {"calibration", "training"},
    {"cards"},
    {"commands"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MAX_FILE, MAX_FUNCTION = 400, 60
# heavy libraries: who may import them, and never at the top of a module
HEAVY = {
    "transformers": ("hf/", "text/", "training/", "calibration/"),
    "peft": ("hf/", "training/"),
    "vllm": ("hf/vllm/",),
    "huggingface_hub": ("hub/", "cards/"),
    "triton": ("gpu/",),
    "ray": ("engines/",),
    "numba": ("kernels/",),
    "matplotlib": ("plotting.py", "commands/eval/plot.py"),
}
COMPILED = ("kernels/", "gpu/")  # compiled when they are imported, so by nobody at the top
BASES = {
    *("Module", "Protocol", "Generic", "NamedTuple", "Enum", "StrEnum", "Mapping", "Exception", "Function"),
    *("Structure", "Listener", "Form"),
    *("Group", "Command", "ParamType", "Option", "ValueError", "TypeError"),
}
# classes and hooks of other libraries, which call them with whatever they have
HOSTED = ("hf/", "training/trainer.py", "training/pretrain.py", "calibration/expert_moments.py")
# huggingface_hub takes HF_ENDPOINT from the environment of its process when it is imported, and from nowhere else
ENVIRONMENT = ("cli/",)
UNPICKLED = ("files/pickled.py",)  # names what torch raises, and nothing else of pickle

Found = Iterator[str]
Rule = Callable[[str, ast.Module], Found]


def sources(root: Path) -> list[tuple[str, str]]:
    return [(str(p.relative_to(root)), p.read_text(encoding="utf-8")) for p in sorted(root.rglob("*.py"))]


def top(path: str) -> str:
    return path.split("/", maxsplit=1)[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)


def layers(path: str, tree: ast.Module) -> Found:
    here = top(path)
    if here in ("__init__", "__main__"):
        return
    for name, node in imports(tree):
        parts = name.split(".")
        if parts[0] == "spectral_surgery" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != here:
            sibling = LEVEL[parts[1]] == LEVEL[here] and LEVEL[here] > 0
            if LEVEL[parts[1]] > LEVEL[here] or sibling:
                yield f"{path}:{node.lineno} imports {parts[1]}, which is not below {here}"


def sizes(path: str, tree: ast.Module) -> Found:
    last = max((node.end_lineno or 0 for node in ast.walk(tree) if isinstance(node, ast.stmt)), default=0)
    if last > MAX_FILE:
        yield f"{path} has {last} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION:
            yield f"{path}:{node.lineno} {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"


def no_hidden_flow(path: str, tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.args.kwarg and not path.startswith(HOSTED):
            yield f"{path}:{node.lineno} {node.name} takes **{node.args.kwarg.arg}"
        if isinstance(node, ast.Global):
            yield f"{path}:{node.lineno} global"
        reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        if reads and not path.startswith(ENVIRONMENT):
            yield f"{path}:{node.lineno} reads the environment"


def bases(path: str, tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not path.startswith(HOSTED):
            for base in node.bases:
                name = ast.unparse(base).split("[")[0].split(".")[-1]
                if name not in BASES and not name.endswith("Error"):
                    yield f"{path}:{node.lineno} {node.name} inherits from {name}"


def heavy_libraries(path: str, tree: ast.Module) -> Found:
    at_top = {id(node) for node in tree.body}
    for name, node in imports(tree):
        allowed = HEAVY.get(name.split(".")[0])
        early = id(node) in at_top and not path.startswith(COMPILED)
        if allowed is not None and (not path.startswith(allowed) or early):
            yield f"{path}:{node.lineno} imports {name}"


def errors(path: str, tree: ast.Module) -> Found:
    for node in ast.walk(tree):
        broad = isinstance(node, ast.ExceptHandler) and (
            node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        )
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")
        if isinstance(node, ast.Assert) or broad or called:
            yield f"{path}:{node.lineno} {type(node).__name__}"
    pickles = [name for name, _ in imports(tree) if name.split(".")[0] in ("pickle", "dill")]
    if path not in UNPICKLED or "pickle." in ast.unparse(tree).replace("pickle.UnpicklingError", ""):
        yield from (f"{path} imports pickle" for _ in pickles)


RULES = (layers, sizes, no_hidden_flow, bases, heavy_libraries, errors)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule) -> None:
    found = [line for path, text in sources(PACKAGE) for line in rule(path, ast.parse(text))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (layers, "codec/x.py", "from spectral_surgery.files import index"),
        (layers, "live/x.py", "import spectral_surgery.files.index"),
        (sizes, "x.py", "pass\n" * 401),
        (sizes, "x.py", "def f():\n" + "    pass\n" * 60),
        (no_hidden_flow, "x.py", "def f(**options): pass"),
        (no_hidden_flow, "x.py", "def f():\n    global a"),
        (no_hidden_flow, "codec/x.py", "import os\nos.environ['A']"),
        (bases, "x.py", "class A(B): pass"),
        (heavy_libraries, "hub/x.py", "import huggingface_hub"),
        (heavy_libraries, "cli/x.py", "def f():\n    import transformers"),
        (errors, "x.py", "assert True"),
        (errors, "x.py", "try: pass\nexcept Exception: pass"),
        (errors, "x.py", "eval('1')"),
        (errors, "x.py", "import pickle"),
    ],
)
def test_every_rule_can_fail(rule: Rule, path: str, text: str) -> None:
    assert list(rule(path, ast.parse(text)))


def test_every_operator_has_a_reference() -> None:
    missing = [name for name in ("matmul", "fourier", "causal_conv") if not (PACKAGE / name / "reference.py").exists()]
    assert not missing


def test_every_module_is_in_a_layer() -> None:
    known = {*LEVEL, "__init__", "__main__"}
    assert {top(path) for path, _ in sources(PACKAGE)} <= known
