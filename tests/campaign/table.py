"""What a campaign tried and how it ended, as a table for the terminal and for the documentation."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_HEAD = """# Faults that are tried

What `make fuzz` does to every command, and how that ended when this page was written; the same command writes it anew.
It stops with an error where a single trial ends in any other way than this page says.

- **Killed**: a run is ended by SIGKILL just before one of the calls by which it changes files (every open for writing,
  write, sync, close, rename, unlink, mkdir, …, by whatever library), in the middle of a write, or several times in a
  row. What then stands at the output is whole, or nothing does. The same command again makes what an undisturbed run
  makes, to the bit, writes no finished block again, and leaves nothing lying about. *anew*: nothing was finished yet;
  *resumed*: it went on; *whole*: all was done, and the command says so. Every call of every command is tried: what lies
  on the disk before each is copied from one run, and the command goes on from each copy. A sample of runs is killed in
  truth, and must leave what the copy holds.
- **Full disk**: from one call on nothing takes room any more; or one call alone fails; or the disk is truly small. The
  command ends with exit code 3 (4 for a disk that is broken), one sentence and one hint, and nothing stands at the
  output but what is whole. With room, the same command makes what an undisturbed run makes.
- **Flipped bit**: of one file of an artifact, or of an unfinished run. Whoever reads it refuses it with exit code 3 and
  one sentence, or gives what it gave before, to the bit. `ulbq inspect --verify` finds all of them.
- **Hostile value**: exit code 0, 2, 3, 4 or 5, one sentence where it is not 0, within 10 seconds of processor time and
  1 GiB; never a traceback.

The models are tiny, on one CPU thread. *10 of 55*: a sample, drawn once and always the same.

"""


@dataclass
class Table:
    """Rows by kind of fault and what it was done to.

    Attributes:
        rows: outcomes by fault and subject.
        possible: how many trials there could have been, where that is known.
    """

    rows: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    possible: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, fault: str, subject: str, outcomes: Iterable[str], possible: int | None = None) -> None:
        """Count the outcomes of some trials."""
        self.rows.setdefault((fault, subject), Counter()).update(outcomes)
        if possible is not None:
            self.possible[fault, subject] = possible

    def markdown(self) -> str:
        """The page: what is promised, and the table."""
        lines = ["| fault | done to | trials | outcomes |", "| --- | --- | --- | --- |"]
        for (fault, subject), outcomes in self.rows.items():
            trials, possible = str(outcomes.total()), self.possible.get((fault, subject))
            if possible is not None and possible != outcomes.total():
                trials += f" of {possible}"
            told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            lines.append(f"| {fault} | `{subject}` | {trials} | {told} |")
        total = sum(outcomes.total() for outcomes in self.rows.values())
        return "\n".join([*lines, "", f"{total:,} trials in all.", ""])

    def write(self, path: Path) -> None:
        """Write the page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_HEAD + self.markdown(), encoding="utf-8")
