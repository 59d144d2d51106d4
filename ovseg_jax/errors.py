"""The one exception that is shown to a user as a sentence, without a traceback."""

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(0xB, 0x20), 0x7F)}


class UserError(Exception):
    """A mistake in what was asked or a file that cannot be used.

    The message is one sentence that names the thing (file, key, value) and, where known, what to do. Entry
    modules print it as `error: <message>` on stderr and exit with status 1. Control characters, which may come from a
    damaged file, are escaped, since a terminal would obey them.
    """

    def __init__(self, message: object = ""):
        super().__init__(str(message).translate(_CONTROLS))
