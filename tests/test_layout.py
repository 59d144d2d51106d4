"""The house: imports go down from room to room, and an import changes nothing but what is imported."""

import ast
import builtins
import functools
import itertools
import json
import os
import subprocess
import symtable
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ovseg_jax"

# From the ground up: a room may import those before it. `data/sources` and `data/scenes` are parts of `data`.
ROOMS = (
    "errors reading files config vocab data datasets parallel kernels losses protocols models pretrained towers torch "
    "cli viz decisions methods evals train experiment inference scoring costs annotation page configs"
).split()
COMMANDS = len(ROOMS)  # What lies beside the rooms: the commands, and the package's own __init__.

# Imports that go up, as "file -> room": this one asks where the folder of configs is, and reads none of them.
KNOWN: set[str] = {"cli/flags.py -> configs"}
# Settings that are still changed at import. The same.
CHANGING: set[str] = set()


def room_of(parts: tuple[str, ...]) -> str:
    """The first part of a module's path in the package, without its suffix."""
    return parts[0].removesuffix(".py") if parts else "__init__"


def rank(room: str) -> int:
    return ROOMS.index(room) if room in ROOMS else COMMANDS


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@functools.cache
def modules(path: Path, package: Path = PACKAGE) -> set[tuple[str, ...]]:
    """What a file imports of the package, at its head, inside a function or by `import_module`, without its name.

    The package's own front, `from ovseg_jax import Segmenter`, is what it imports itself for that name.
    """
    names: set[str] = set()
    here = path.relative_to(package.parent).with_suffix("").parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = [*here[: -node.level], node.module] if node.level else [node.module]
            base = ".".join(filter(None, start))
            # `from ovseg_jax import config` names a module, `from ovseg_jax.config import parse_arg` is in one.
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    own = {tuple(name.split("."))[1:] for name in names if name.split(".")[0] == package.name}
    front = package / "__init__.py"
    if path == front or not front.exists():
        return own
    lent = {module[-1]: module for module in modules(front, package)}
    return {lent.get(module[0], module) if len(module) == 1 else module for module in own}


def imported(path: Path, package: Path = PACKAGE) -> set[str]:
    """The rooms that a file imports."""
    return {room_of(module) for module in modules(path, package)}


def both_ways(package: Path = PACKAGE) -> set[tuple[str, str]]:
    """Folders that import each other, at any depth; what lies beside the rooms counts as no folder."""
    found = set()
    for path in package.rglob("*.py"):
        for module in modules(path, package):
            folder = package
            for part in module:
                folder = folder / part if (folder / part).is_dir() else folder
            if path.parent != folder and package not in (path.parent, folder):
                found.add((str(path.parent.relative_to(package)), str(folder.relative_to(package))))
    return {(a, b) for a, b in found if (b, a) in found and a < b}


def upward(package: Path = PACKAGE) -> set[str]:
    """Imports of a room above, or of a command from anything but a command."""
    found = set()
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package)
        own = room_of(file.parts)
        for other in imported(path, package) - {own}:
            public = rank(other) == COMMANDS and not _is_module(package, other)
            # `from ovseg_jax import Segmenter` is the package's own front.
            if not public and rank(other) >= rank(own) and rank(own) < COMMANDS:
                found.add(f"{file.as_posix()} -> {other}")
    return found


def _is_module(package: Path, name: str) -> bool:
    return (package / name).is_dir() or (package / f"{name}.py").is_file()


def test_imports_go_down_only():
    """So no two rooms import each other either."""
    found = upward()
    assert not found - KNOWN, f"imports that go up: {sorted(found - KNOWN)}"
    assert not KNOWN - found, f"no longer there, so take them out of KNOWN: {sorted(KNOWN - found)}"


def test_no_two_folders_import_each_other():
    """Also where they lie in one room."""
    assert not both_ways()


def test_every_folder_is_a_room():
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*/*.py")}
    assert folders <= set(ROOMS), f"folders without a place in ROOMS: {sorted(folders - set(ROOMS))}"


def test_an_import_that_goes_up_is_found(tmp_path):
    for name, text in {
        "vocab/words.py": "def f():\n    from toy.methods import build\n",
        "methods/base.py": "import toy.vocab.words\nfrom toy import main\n",
        "models/net.py": "from ..towers import clip\nfrom . import other\n",
        "main.py": "from toy import score\nfrom toy.experiment import run\n",
        "score.py": "",
        "config.py": "from toy.errors import UserError\n",
        "__init__.py": "def __getattr__(name):\n    from toy.inference.segmenter import Segmenter\n",
        "kernels/a.py": "from toy import Segmenter\nfrom toy import config\n",
        "losses/a.py": "import importlib\nimportlib.import_module('toy.train.loop')\n",
        "data/pipeline.py": "from toy.data.sources.build import make\n",
        "data/sources/build.py": "from toy.data import pipeline\nfrom toy.data.sources import other\n",
        "page/app.py": "from toy import Segmenter\n",
    }.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert upward(tmp_path / "toy") == {
        "vocab/words.py -> methods",
        "methods/base.py -> main",
        "models/net.py -> towers",
        "kernels/a.py -> inference",
        "losses/a.py -> train",
    }
    assert both_ways(tmp_path / "toy") == {("data", "data/sources"), ("methods", "vocab")}


IMPORT_ALL = """
import importlib, json, os, pkgutil
import jax, numpy
from orbax.checkpoint import type_handlers

def load(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # an extra that is not installed
        assert not error.name.startswith(own), error

def settings():
    handlers = [type_handlers.get_type_handler(kind) for kind in (jax.Array, numpy.ndarray, int, float, str)]
    return {"os.environ": dict(os.environ), "jax.config": {k: repr(v) for k, v in jax.config.values.items()},
            "Orbax's type handlers": [id(handler) for handler in handlers]}

own, others = json.loads(input())
for name in others:
    load(name)
before, changed = settings(), []
for module in pkgutil.walk_packages(importlib.import_module(own).__path__, own + "."):
    load(module.name)
    changed += [f"{module.name}: {key}" for key, value in settings().items() if value != before[key]]
    before = settings()
print(json.dumps(changed))
"""


def changes_at_import(package: Path) -> list[str]:
    """Imports every module of a package in a new process; "module: what it changed" where it changed something.

    What third parties change when they are imported is theirs: they are imported before.
    """
    others: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Import):
                others |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                others.add(node.module)
    foreign = sorted(name for name in others if name.split(".")[0] != package.name)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        input=json.dumps([package.name, foreign]),
        env=os.environ | {"PYTHONPATH": str(package.parent), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_every_module_changes_no_setting():
    changes = changes_at_import(PACKAGE)
    found = {change.partition(": ")[2] for change in changes}
    assert not found - CHANGING, f"settings that change at import: {changes}"
    assert not CHANGING - found, f"no longer so, take them out of CHANGING: {sorted(CHANGING - found)}"


def test_a_setting_that_an_import_changes_is_found(tmp_path):
    (tmp_path / "toy").mkdir()
    for name, text in {
        "__init__": "",
        "a": "import os\nos.environ['TOY'] = '1'\n",
        "b": "import jax\njax.config.update('jax_enable_x64', True)\n",
        "c": "import jax\nfrom orbax import checkpoint as ocp\nocp.type_handlers.register_type_handler("
        "jax.Array, ocp.type_handlers.ArrayHandler(), override=True)\n",
        "d": "import a_library_that_is_missing\n",
    }.items():
        (tmp_path / "toy" / f"{name}.py").write_text(text)
    found = changes_at_import(tmp_path / "toy")
    assert found == ["toy.a: os.environ", "toy.b: jax.config", "toy.c: Orbax's type handlers"]


def test_what_a_method_may_have_is_declared_by_its_base_class():
    """With a default, in place of a question whether it is there."""
    asked = [
        f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")
        if ast.unparse(node.args[0]).split(".")[-1] in ("method", "source", "evaluator")
    ]
    assert not asked


def test_test_files_have_names_of_their_own():
    """One process of pytest imports them by base name, whatever their folder."""
    names = sorted(path.name for path in Path(__file__).parent.rglob("*.py"))
    assert [a for a, b in itertools.pairwise(names) if a == b] == []


def undefined(code, name):
    """The names that a module uses, and neither it nor Python defines."""
    top = symtable.symtable(code, name, "exec")
    known = {
        s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()
    }
    known |= {*dir(builtins), "__file__", "__class__"}
    tables = [top]
    for table in tables:
        tables += table.get_children()
    used = (s for table in tables for s in table.get_symbols() if s.is_referenced())
    return sorted({s.get_name() for s in used if s.is_global() or s in top.get_symbols()} - known)


def test_every_name_that_is_used_is_defined():
    """mypy and ruff look for this no longer, since the sizes of arrays in annotations are no names."""
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "configs").rglob("*.py"), *(ROOT / "tests").rglob("*.py")):
        assert undefined(path.read_text("utf-8"), path.name) == [], path
    code = "def f(x):\n    y: 'n d' = g(x)\n    return [y + z for z in len(x)]\n\nh = k\n"
    assert undefined(code, "toy.py") == ["g", "k"]
