"""First lines of functions' docstrings: a sentence that begins with a verb in the third person ("Returns the ...")."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ovseg_jax"
FIRST_LINE = re.compile(r"(?!(This|Its)\b)[A-Z][a-z]+s\b.*[.:]")


def functions(tree: ast.AST, scope: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions and methods of a module, by name; properties, which are nouns, and inner functions are left out."""
    for node in getattr(tree, "body", ()):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{scope}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not any(
            "property" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            yield f"{scope}{node.name}", node


def other_first_lines(source: str) -> dict[str, str]:
    """The functions whose first line does not begin with a verb in the third person or does not end, with that line."""
    found = {}
    for name, function in functions(ast.parse(source)):
        first = (ast.get_docstring(function) or "Returns.").partition("\n")[0]
        if not FIRST_LINE.fullmatch(first):
            found[name] = first
    return found


def test_docstrings_of_functions_begin_with_a_verb():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        found |= {f"{file}:{name}": line for name, line in other_first_lines(path.read_text("utf-8")).items()}
    assert not found, f"first lines that are no sentence, or begin with another word than a verb: {found}"


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

def cut():
    """Cuts a thing and returns all of
    its parts.
    """

def silent():
    pass
'''
    assert other_first_lines(source) == {
        "Thing.size": "The size of a thing.",
        "make": "Make a thing.",
        "cut": "Cuts a thing and returns all of",
    }
