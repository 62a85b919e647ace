"""The one exception that reaches users as a single sentence instead of a traceback, and what it takes over of others."""


class UserError(Exception):
    """Bad input from outside: says in one sentence what was wrong, where, and what to do.

    `msr` and the `data_prep` tools print it and exit with code 2. Raise it before anything is written.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, 200 characters at most; the name of its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
