"""Errors that end a run with one line in place of a traceback."""


def one_line(error: object) -> str:
    """The message of an error without its line ends."""
    return " ".join(str(error).split())


class RunError(Exception):
    """What the user can correct, or must decide, at any moment of a run. Its message is one line, and the exit code is 1.

    Before training begins a ValueError does the same; after that, a ValueError is a fault of ours.
    """

    is_on_all_ranks = False
    """Whether every rank raises it, so that one of them says it for all."""


class JobFailed(Exception):
    """A job of a sweep has ended with an error that has been printed. The others go on, and the sweep ends with exit code 1."""
