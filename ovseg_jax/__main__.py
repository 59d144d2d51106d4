"""The command `ovseg VERB`: `ovseg predict ...` is `python -m ovseg_jax.predict ...`; without a verb it lists them."""

import ast
import pkgutil
import runpy
import sys
from pathlib import Path

import ovseg_jax
from ovseg_jax.cli.console import print_error
from ovseg_jax.errors import UserError


def verbs() -> dict[str, str]:
    """Returns a line of description for each command, without importing it."""
    found = {}
    for folder in map(Path, ovseg_jax.__path__):
        for module in pkgutil.iter_modules([str(folder)]):
            text = "" if module.ispkg else (folder / f"{module.name}.py").read_text("utf-8")
            if "\nif __name__ == " in text and not module.name.startswith("_"):
                first = (ast.get_docstring(ast.parse(text)) or "").partition(":")[0]
                found[module.name] = first.removeprefix("The command that ")
    return found


def main() -> int:
    """Runs the command that the first argument names, with the others, and returns the exit status."""
    known = verbs()
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        width = max(map(len, known))
        print("usage: ovseg VERB ...; ovseg VERB --help lists the flags of one\n")
        print("\n".join(f"  {name:{width}}  {text}" for name, text in known.items()))
        return 0
    if verb not in known:
        return print_error(UserError(f"the verb {verb!r} is not one of {', '.join(known)}"))
    del sys.argv[1]
    runpy.run_module(f"ovseg_jax.{verb}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
