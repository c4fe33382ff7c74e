"""The errors that a user sees as one line. This module imports nothing of ours."""

import contextlib

INTERRUPTED = 75  # exit code of a run that was asked to stop and has saved: the same command resumes it


class InputError(ValueError):
    """A mistake that the user can correct. A job prints it as one line and exits with code 2."""


class RunError(RuntimeError):
    """A fault while running, such as unreadable images. A job prints it as one line and exits with code 1."""

    def __str__(self):
        # From a loader's worker, torch hands it on with the traceback there; the message is the last line.
        return super().__str__().splitlines()[-1].removeprefix(f'{__name__}.RunError: ')


@contextlib.contextmanager
def as_input_error():
    """Turn a ValueError raised inside into an InputError: for code whose values come from the user."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None
