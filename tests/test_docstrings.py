"""First lines of docstrings: a function says what it does, by a verb in the third person ("Returns the ...")."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ovseg_jax"
VERB = re.compile(r"[A-Z][a-z]+s\b")
# "file:function" -> the reason. To be kept short.
EXCEPTIONS: dict[str, str] = {}


def functions(tree: ast.AST, scope: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions and methods of a module, by name; properties, which are nouns, and inner functions are left out."""
    for node in getattr(tree, "body", ()):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{scope}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not any(
            "property" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            yield f"{scope}{node.name}", node


def without_verb(source: str) -> dict[str, str]:
    """The functions whose docstring begins with another word than a verb in the third person, with that line."""
    found = {}
    for name, function in functions(ast.parse(source)):
        first = (ast.get_docstring(function) or "Returns").partition("\n")[0]
        if not VERB.match(first):
            found[name] = first
    return found


def test_docstrings_of_functions_begin_with_a_verb():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        found |= {f"{file}:{name}": line for name, line in without_verb(path.read_text("utf-8")).items()}
    wrong = {place: line for place, line in found.items() if place not in EXCEPTIONS}
    assert not wrong, f"first lines without a verb in the third person: {wrong}"
    assert not EXCEPTIONS.keys() - found.keys(), "exceptions that are needed no more"


def test_another_first_line_is_found():
    source = '''
class Thing:
    """A thing."""

    def size(self):
        """The size of a thing."""

    @property
    def name(self):
        """The name."""

    def grow(self):
        """Grows."""

def make():
    """Make a thing.

    Returns it.
    """

def silent():
    pass
'''
    assert without_verb(source) == {"Thing.size": "The size of a thing.", "make": "Make a thing."}
