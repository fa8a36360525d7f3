"""The one exception a user sees."""


class InputError(ValueError):
    """Something the user can mend: a file, a flag, a plan or a checkpoint. One line that says what and where."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, cut to its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
