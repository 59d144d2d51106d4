"""The one exception that is shown to a user as a sentence, without a traceback."""


class UserError(Exception):
    """A mistake in what was asked or a file that cannot be used.

    The message is one sentence that names the thing (file, key, value) and, where known, what to do. Entry
    modules print it as `error: <message>` on stderr and exit with status 1.
    """
