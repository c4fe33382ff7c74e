"""The errors that a user sees as one line. This module imports nothing of ours."""

import contextlib
import os

INTERRUPTED = 75  # exit code of a run that was asked to stop and has saved


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and has saved. A job exits with INTERRUPTED; a notebook goes on."""

    def _render_traceback_(self):  # what IPython shows
        return [f'Interrupted: {self}']


class InputError(ValueError):
    """A mistake that the user can correct. A job prints it as one line and exits with code 2."""


class RunError(RuntimeError):
    """A fault while running. A job prints it as one line and exits with code 1."""

    def __str__(self):
        # torch raises a worker's error again with its traceback as text; the last line is ours.
        return super().__str__().splitlines()[-1].removeprefix(f'{__name__}.RunError: ')


@contextlib.contextmanager
def as_input_error(path=None):
    """Turn a ValueError or OSError raised inside into an InputError, about path if it is given."""
    try:
        yield
    except OSError as error:
        where = path or os.fsdecode(error.filename or '')
        raise InputError(f'{where}: {error.strerror}') from None
    except ValueError as error:
        raise InputError(f'{path}: {error}' if path else str(error)) from None
