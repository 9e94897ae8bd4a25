"""The errors that speak to the user, and the exit codes of programs."""

MISTAKE = 1  # exit code after a UserError: the same command will fail again
TEMPORARY = 75  # EX_TEMPFAIL, "try again": the same command resumes


class UserError(ValueError):
    """Something the user can put right: one sentence with the offending value and what would be right.

    Programs print it and exit without a stack trace, with code 1, or 75 for a TemporaryError.
    """


class TemporaryError(UserError):
    """A UserError that may be gone when the same command is run again, such as a process that did not come."""


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a program that ends with an error."""
    return TEMPORARY if isinstance(error, TemporaryError) else MISTAKE
