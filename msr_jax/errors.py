"""The one exception that reaches users as a single sentence instead of a traceback, and what it takes over of others."""

import errno

# A file's, not the network's: libraries that fetch raise both as OSErrors, and write without naming the file.
ON_DISK = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS}
# Of a place that the user named, wherever it shows: pathlib raises these where it is asked whether something exists.
OF_A_PLACE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}


class UserError(Exception):
    """Bad input from outside: says in one sentence what was wrong, where, and what to do.

    `msr` and the `data_prep` tools print it and exit with code 2. Raise it before anything is written.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, 200 characters at most; the name of its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def is_of_disk(error: BaseException) -> bool:
    """Whether what a library raised while it fetched is about the file that it writes, as on a full disk."""
    return isinstance(error, OSError) and bool(
        error.filename or error.errno in ON_DISK or isinstance(error, PermissionError)
    )
