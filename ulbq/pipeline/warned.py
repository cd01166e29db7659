"""What a run warned of: each thing once, with the list of what it concerns, for the terminal and for the manifest."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

from ulbq.progress import Phase, Progress


class Recording:
    """A progress that also keeps what it warned of.

    Attributes:
        warnings: every warning so far, each once.
    """

    def __init__(self, progress: Progress) -> None:
        self.warnings: list[str] = []
        self._progress = progress

    def phase(self, name: str, total: int | None = None, *, rounds: int | None = None) -> AbstractContextManager[Phase]:
        return self._progress.phase(name, total, rounds=rounds)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            self._progress.warn(text)


def gathered(said: Mapping[int, Iterable[tuple[str, str]]]) -> list[str]:
    """Warnings of blocks, those of one kind as one.

    Args:
        said: by the block's index, each warning as what it concerns inside the block (empty for all of it), and a
            sentence without its subject.

    Returns:
        Sentences: ``Blocks 0 to 3 and 7, q_proj, k_proj: few tokens.``
    """
    blocks: dict[tuple[str, str], list[int]] = {}
    for index in sorted(said):
        for concerned, sentence in said[index]:
            blocks.setdefault((concerned, sentence), []).append(index)
    return [
        f"{_blocks(indices)}{f', {concerned}' * bool(concerned)}: {sentence}"
        for (concerned, sentence), indices in blocks.items()
    ]


def _blocks(indices: list[int]) -> str:
    return f"{'Block' if len(indices) == 1 else 'Blocks'} {_ranges(indices)}"


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in words: ``0 to 3 and 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
