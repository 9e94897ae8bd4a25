"""The error that speaks to the user."""


class UserError(ValueError):
    """Something the user can put right: one sentence with the offending value and what would be right.

    Programs print it and exit with code 1, without a stack trace.
    """
