"""The one exception that reaches users as a single sentence instead of a traceback."""


class UserError(Exception):
    """Bad input from outside: says in one sentence what was wrong, where, and what to do.

    `msr` and the `data_prep` tools print it and exit with code 2. Raise it before anything is written.
    """
