"""The house: imports go down from room to room, and an import changes nothing but what is imported."""

import ast
import itertools
import json
import os
import subprocess
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

# Imports that still go up, as "file -> room". To be removed, never added to.
KNOWN: set[str] = set()
# Settings that are still changed at import. The same.
CHANGING: set[str] = set()


def room_of(parts: tuple[str, ...]) -> str:
    """The first part of a module's path in the package, without its suffix."""
    return parts[0].removesuffix(".py") if parts else "__init__"


def rank(room: str) -> int:
    return ROOMS.index(room) if room in ROOMS else COMMANDS


def imported(path: Path, package: Path = PACKAGE) -> set[str]:
    """The rooms that a file imports, at its head or inside a function."""
    names: set[str] = set()
    here = path.relative_to(package.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = [*here[: -node.level], node.module] if node.level else [node.module]
            base = ".".join(filter(None, start))
            # `from ovseg_jax import config` names a module, `from ovseg_jax.config import parse_arg` is in one.
            names |= {f"{base}.{alias.name}" for alias in node.names}
    parts = (tuple(name.split(".")) for name in names)
    return {room_of(p[1:]) for p in parts if p[0] == package.name}


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
    }.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert upward(tmp_path / "toy") == {
        "vocab/words.py -> methods",
        "methods/base.py -> main",
        "models/net.py -> towers",
    }


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


def test_test_files_have_names_of_their_own():
    """One process of pytest imports them by base name, whatever their folder."""
    names = sorted(path.name for path in Path(__file__).parent.rglob("*.py"))
    assert [a for a, b in itertools.pairwise(names) if a == b] == []
