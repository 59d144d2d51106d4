"""The one exception that is shown to a user as a sentence, without a traceback."""

import importlib
from typing import Any

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(0xB, 0x20), 0x7F)}


class UserError(Exception):
    """A mistake in what was asked or a file that cannot be used.

    The message is one sentence that names the thing (file, key, value) and, where known, what to do. Entry
    modules print it as `error: <message>` on stderr and exit with status 1. Control characters, which may come from a
    damaged file, are escaped, since a terminal would obey them.
    """

    def __init__(self, message: object = ""):
        super().__init__(str(message).translate(_CONTROLS))


def optional(module: str, missing: str) -> Any:
    """Imports a module of a package that may be missing.

    Args:
      module: its name.
      missing: the sentence for users who lack it, which says how to install it; "{error}" stands for Python's message.

    Raises:
      UserError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(missing.replace("{error}", str(error))) from error
