"""What a command told."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Told:
    """What one command did: exit code, standard output, standard error."""

    code: int
    out: str
    err: str
    words: tuple[str, ...] = field(default=())

    def refused(self, code: int = 3) -> str:
        """The sentence of a command that ends with this exit code and one sentence; fails the test otherwise."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert self.code == code, (self.words, self.code, self.err)
        assert len(errors) == 1, (self.words, self.err)
        assert "Traceback" not in self.err
        return errors[0].removeprefix("error: ")


Ulbq = Callable[..., Told]
