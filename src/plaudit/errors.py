"""The one exception for everything that a user can put right."""


class PlauditError(Exception):
    """One clear sentence: what is wrong, where it is (file, line, field), and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class SharedError(PlauditError):
    """One that all processes of a run raise at the same place, so that they can still do something together."""
