"""The one exception a user sees."""


class InputError(ValueError):
    """Something the user can mend: a file, a flag, a plan or a checkpoint. One line that says what and where."""
