"""The errors that speak to the user, and the exit codes of programs; `causes.exit_code` sorts errors by them."""

MISTAKE = 1  # exit code after a UserError: the same command will fail again
DEFECT = 70  # EX_SOFTWARE: an error that nobody foresaw, with a stack trace
TEMPORARY = 75  # EX_TEMPFAIL, "try again": the same command resumes
# JAX (0.10.2) aborts a process when another one of the run is gone, from C++: 128 + SIGABRT.
LOST = 134
TERMINATED = 143  # 128 + SIGTERM: preempted, and saved
# After these, and no others, a launcher starts the same command again.
RESTART = (TEMPORARY, LOST, TERMINATED)


class UserError(ValueError):
    """Something the user can put right: one sentence with the offending value and what would be right.

    Programs print it and exit without a stack trace, with code 1, or 75 if it may pass by itself.
    """


class TemporaryError(UserError):
    """A UserError that may be gone when the same command is run again, such as a process that did not come."""
