"""Messages of a conversation: lines that are typed at a terminal, or that a pipe or a file brings."""

import signal
import sys
import threading

from ulbq.errors import InputError
from ulbq.progress import Progress

_SIGN = "> "
_LONGEST_LINE = 1 << 20  # bytes


class Questions:
    """Asks for one message after the other.

    Args:
        progress: told at a terminal which keys there are.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._count = 0

    def __call__(self) -> str | None:
        """The next message; None at the end.

        Raises:
            KeyboardInterrupt: on a line on which nothing is typed.
            InputError: a pipe brings no message at all, or what is no text.
        """
        typed = sys.stdin is not None and sys.stdin.isatty()
        if not self._count:
            _take_interrupts()
            if typed:
                self._progress.note("A line is a message. Ctrl-C cuts an answer; Ctrl-D, or Ctrl-C on no text, ends.")
        message = _read_terminal() if typed else _read_line()
        if message is None and not self._count and not typed:
            raise InputError("Standard input brought no message.", hint="A line of it is a message.")
        self._count += 1
        return message


def _take_interrupts() -> None:
    """From now on an interrupt is part of the conversation: an error that comes later is no consequence of it."""
    if callable(signal.getsignal(signal.SIGINT)) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _read_terminal() -> str | None:
    while True:
        try:
            return _read_typed()
        except EOFError:
            sys.stderr.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            if not _begun():
                raise


def _read_typed() -> str:
    """A line with the editing keys of a shell, where text is shown on the terminal too. Raises EOFError."""
    if not sys.stdout.isatty():
        sys.stderr.write(_SIGN)
        sys.stderr.flush()
        return input()
    try:
        import readline

        # Several lines that are pasted are one message.
        readline.parse_and_bind("set enable-bracketed-paste on")
    except ImportError:  # a Python that was built without
        pass
    return input(_SIGN)


def _begun() -> bool:
    """Whether something was typed on the line that an interrupt ended."""
    readline = sys.modules.get("readline")
    return readline is not None and bool(readline.get_line_buffer())


def _read_line() -> str | None:
    """A line of a pipe or a file; None behind the last. Raises InputError."""
    raw = sys.stdin.buffer.readline(_LONGEST_LINE + 1) if sys.stdin is not None else b""
    if len(raw) > _LONGEST_LINE:
        raise InputError("A line on standard input is longer than any message.")
    try:
        return raw.decode().removesuffix("\n") if raw else None
    except UnicodeDecodeError as error:
        raise InputError("What standard input brings is not UTF-8.") from error
