"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake in what the user gave: one line that names the culprit and the remedy.

    Command lines print it as ``error: ...`` without a traceback and exit with status 2.
    """
