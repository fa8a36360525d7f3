"""The one exception a user sees."""


class InputError(ValueError):
    """Something the user can mend: a file, a flag, a plan or a checkpoint. One line that says what and where.

    Names of a hostile checkpoint reach the terminal without line breaks and control codes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in message))


def first_line(error: BaseException) -> str:
    """What another library's exception says, cut to its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def add_note(error: BaseException, text: str) -> None:
    """What BaseException.add_note does, in Python 3.10 too."""
    error.__notes__ = [*notes(error), text]  # type: ignore[attr-defined,unused-ignore]


def notes(error: BaseException | None) -> list[str]:
    """The notes on an error, and on those that it came from."""
    if error is None:
        return []
    return [*getattr(error, "__notes__", []), *notes(error.__cause__ or error.__context__)]
