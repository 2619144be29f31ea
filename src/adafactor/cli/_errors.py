"""What ends a command early: a mistake the user can mend, a failed check, or a signal."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. ``main`` prints the message as one line on stderr and exits with 2."""


class CheckFailed(Exception):
    """The package is wrong here. ``main`` prints the message as one line on stderr and exits with 1."""


class Interrupted(Exception):
    """A signal ended the command after its work was put in order. ``main`` exits with 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
