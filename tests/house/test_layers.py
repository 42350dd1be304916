"""Rules about ourselves: which file may import which, and what the package must never contain."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "regpt"
FILES = sorted(SRC.rglob("*.py"))

# Lower layers first; a module may import its own layer and those above it in this list. The longest prefix counts.
LAYERS = [
    ["errors", "config", "durations", "paths", "threads", "evals.names", "__init__"],
    [
        "tokenizers",
        "train.dist",
        "train.launch",
        "train.track",
        "train.signals",
        "train.allocator",
        "train.batches",
        "train.durable",
        "train.__init__",
    ],
    ["data", "models", "optim", "train.run", "train.machine"],
    ["train.checkpoint", "train.named", "train.load", "train.plan", "train.budget", "infer"],
    ["evals"],
    ["train.estimate", "train.parallel", "train.operators", "train.compile", "train.tasks"],
    ["train.loop", "train.session", "train.sizing", "train.bench", "serve", "adapters", "report"],
    ["cli", "__main__"],
]
OPTIONAL = [
    "pyarrow",
    "zstandard",
    "yaml",
    "huggingface_hub",
    "tensorboard",
    "wandb",
    "transformers",
    "datasets",
    "fastapi",
    "lightning",
    "gigatoken",
    "rustbpe",
    "lm_eval",
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts)


def layer(module: str) -> int:
    names = [(name, i) for i, layer in enumerate(LAYERS) for name in layer]
    fitting = [(len(n), i) for n, i in names if module == n or module.startswith(n + ".")]
    assert fitting, f"{module} belongs to no layer: name it in tests/house/test_layers.py"
    return max(fitting)[1]


def imports(path: Path) -> set[str]:
    """Every module of ours and of others that the file imports, inside functions too; ours without `regpt.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {
                f"{node.module}.{a.name}" if is_module(f"{node.module}.{a.name}") else node.module
                for a in node.names
            }
    return {m.removeprefix("regpt.") if m.startswith("regpt.") else m for m in found}


def is_module(dotted: str) -> bool:
    path = SRC.parent.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def ours(module: str) -> bool:
    return is_module("regpt." + module)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    me = module_name(path)
    if me == "__init__":
        return  # the public names: everything may be offered there, lazily
    wrong = [m for m in imports(path) if ours(m) and layer(m) > layer(me)]
    assert not wrong, f"{me} imports {wrong}, which stand above it"


@pytest.mark.parametrize("library", OPTIONAL)
def test_an_optional_library_is_imported_by_one_file(library: str) -> None:
    users = [module_name(p) for p in FILES if any(re.match(rf"{library}(\.|$)", m) for m in imports(p))]
    assert len(users) <= 1, f"{library} is imported by {users}"


def test_the_command_line_starts_without_heavy_libraries() -> None:
    """`regpt --help` must answer at once, so nothing large may be imported for it."""
    code = "import sys, regpt.cli; regpt.cli.main(['--help']); print(sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.splitlines()[-1]
    for heavy in ("torch", "numpy", "tyro", "rich", "tiktoken"):
        assert f"'{heavy}'" not in loaded


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not [p for p in FILES if p.stem in ("utils", "util", "common", "helpers", "misc")]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_file_says_its_thought_first(path: Path) -> None:
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    assert len(first) > 15, f"{module_name(path)} has no docstring that says what it is"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_is_executed_or_unpickled(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & set(names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("exec", "eval", "torch.load", "__import__"), (
                f"{module_name(path)}: {called}"
            )


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_functions_stay_readable(path: Path) -> None:
    """A function is under 60 lines, its docstring aside."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            doc = node.body[0] if ast.get_docstring(node) else None
            lines = (node.end_lineno or 0) - node.lineno - ((doc.end_lineno or 0) - doc.lineno if doc else 0)
            assert lines <= 60, f"{module_name(path)}.{node.name} has {lines} lines"


def test_settings_are_documented() -> None:
    """Every setting has a docstring under it: that is its --help."""
    tree = ast.parse((SRC / "config.py").read_text(encoding="utf-8"))
    for cls in [
        n
        for n in tree.body
        if isinstance(n, ast.ClassDef) and n.name.endswith("Config") and n.name != "Config"
    ]:
        for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{cls.name}.{ast.unparse(node.target)} has no docstring"
