"""The one exception that a user is meant to read, and what of a file's text one may print."""


def printable(text: str, longest: int = 2000) -> str:
    """Returns text from anywhere as one line that does nothing to a terminal."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:longest])
    return line if len(text) <= longest else f"{line} ..."


class UserError(Exception):
    """A mistake in what the user gave: one line that names the culprit and the remedy.

    Command lines print it as ``error: ...`` without a traceback and exit with status 2.
    """


def refuse(is_wrong: bool, message: str) -> None:
    """Raises a UserError with a message if something is wrong."""
    if is_wrong:
        raise UserError(message)
