"""The one exception whose message is for the user, and what keeps text from files harmless."""


def printable(text: str, longest: int = 2000) -> str:
    """Returns any text as one line without control characters, at most ``longest`` long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:longest])
    return line if len(text) <= longest else f"{line} ..."


def stays_inside(name: str) -> bool:
    """Whether a name with "/" between its parts cannot leave the folder that it is joined to."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)


class UserError(Exception):
    """A mistake in the user's input: one line that names the culprit and the remedy.

    Command lines print it as ``error: ...`` without a traceback and exit with status 2. Control
    characters, which a file name may hold, are escaped, so that no name drives a terminal.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def refuse(is_wrong: bool, message: str) -> None:
    """Raises a UserError with this message if ``is_wrong``."""
    if is_wrong:
        raise UserError(message)
