"""Every failure that a user can mend is a :class:`UlbqError`: one sentence, one hint, one exit code.

Library code raises these and never prints or exits; ``commands`` is the only layer that shows them.
"""


class UlbqError(Exception):
    """A failure with a sentence for people.

    Args:
        message: what is wrong, one sentence.
        hint: what to do about it, one sentence; may be empty.
    """

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:  # for those who see a traceback
            self.add_note(hint)


class UsageError(UlbqError):
    """Options that do not exist, or do not go together."""

    exit_code = 2


class InputError(UlbqError):
    """A source, data file or artifact that cannot be used."""

    exit_code = 3


class ResourceError(UlbqError):
    """The environment lacks something: an extra, memory, the network, a disk that can be written."""

    exit_code = 4


class DiskFullError(ResourceError):
    """What is to be written does not fit where it is to go: for scripts, an unfit output like an unfit input."""

    exit_code = 3


class NumericsError(UlbqError):
    """The numbers went wrong and no retry mended them."""

    exit_code = 5
