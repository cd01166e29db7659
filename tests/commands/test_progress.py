"""What progress looks like in a log, on a terminal and when quiet."""

import io

import pytest
from rich.console import Console

from ulbq.commands.progress import LiveProgress, Pace, PlainProgress, QuietProgress, duration


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False, color_system=None)


def _shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (4.21, "4.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (580, "9:40"),
        (3723, "1:02:03"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_pace_extrapolates_and_counts_down_between_steps():
    clock = _Clock()
    pace = Pace(10, clock=clock)
    assert pace.left is None
    clock.now += 20
    pace.advance(2)
    assert pace.left == pytest.approx(80)
    clock.now += 5
    assert pace.left == pytest.approx(75)
    # A step that takes its time leaves those after it to come.
    clock.now += 1000
    assert pace.left == pytest.approx(70)
    pace.advance(8)
    assert pace.left == 0


def test_pace_forgets_a_first_step_that_is_not_like_the_others():
    clock = _Clock()
    pace = Pace(272, clock=clock)
    clock.now += 66
    pace.advance(1)
    assert pace.left is None  # 66 seconds for each of 272 would be five hours
    for done in range(2, 101):
        clock.now += 0.5
        pace.advance(1)
        assert pace.left == pytest.approx(0.5 * (272 - done))


def test_pace_follows_a_speed_that_changes():
    clock = _Clock()
    pace = Pace(100, clock=clock)
    for _ in range(20):
        clock.now += 1
        pace.advance(1)
    for _ in range(30):
        clock.now += 3
        pace.advance(1)
    assert pace.left == pytest.approx(150)


def test_pace_counts_rounds_where_steps_differ():
    # Blocks of five epochs a second each, with ten seconds before the first one and five after the last one.
    clock = _Clock()
    pace = Pace(24, 4, clock)
    for block in range(4):
        clock.now += 10
        for epoch in range(5):
            clock.now += 1
            pace.advance(1)
            if block:
                assert pace.left == pytest.approx(20 * (4 - block) - 11 - epoch)
            elif epoch:  # nothing says yet that the last step takes five seconds and not one
                assert pace.left == pytest.approx(4 * 16 - 11 - epoch)
        clock.now += 5
        pace.advance(1)
        assert pace.left == pytest.approx(20 * (3 - block))


def test_pace_takes_half_of_a_first_step_for_loading():
    # Two steps a block: the first loads, runs the samples through and trains, the second packs.
    clock = _Clock()
    pace = Pace(4, 2, clock)
    clock.now += 16
    pace.advance(1)
    assert pace.left == 8 + 24
    clock.now += 3
    assert pace.left == 5 + 24
    pace.advance(1)
    assert pace.left == 19
    clock.now += 20
    pace.advance(1)
    assert pace.left == 3  # as in the first block, though this one is late already
    clock.now += 3
    pace.advance(1)
    assert pace.left == 0


def test_pace_is_not_moved_by_a_word_about_a_step_that_goes_on():
    clock = _Clock()
    pace = Pace(8, 2, clock)
    for _ in range(2):
        clock.now += 10
        pace.advance(1)
    clock.now += 4
    pace.advance(0)
    assert pace.left == 6 + 10 + 40


def test_pace_does_not_count_what_comes_before_the_first_step():
    clock = _Clock()
    pace = Pace(4, clock=clock)
    clock.now += 30
    pace.advance(0)
    clock.now += 10
    pace.advance(1)
    assert pace.left == 30


def test_pace_ignores_steps_of_an_earlier_run():
    clock = _Clock()
    pace = Pace(30, clock=clock)
    pace.advance(10)
    assert pace.left is None
    clock.now += 20
    pace.advance(1)
    clock.now += 20
    pace.advance(1)
    assert pace.left == pytest.approx(18 * 20)


def test_pace_without_a_total_knows_no_end():
    clock = _Clock()
    pace = Pace(None, clock=clock)
    clock.now += 20
    pace.advance(3)
    assert pace.left is None
    assert str(pace) == "3"


def test_plain_writes_a_line_now_and_then_and_one_at_the_end():
    clock, console = _Clock(), _console()
    progress = PlainProgress(console, interval=10, clock=clock)
    with progress.phase("blocks", 4) as phase:
        for step in range(4):
            clock.now += 6
            phase.advance(detail=f"loss 0.{step}")
    assert _shown(console).splitlines() == [
        "blocks: 2/4, 12 s passed, 12 s left, loss 0.1",
        "blocks: 4/4, 24 s passed, 0.0 s left, loss 0.3",
        "blocks: 4/4 done in 24 s",
    ]


def test_plain_says_nothing_at_the_end_of_inner_phases():
    console = _console()
    progress = PlainProgress(console)
    with progress.phase("blocks", 2) as phase:
        for _ in range(2):
            with progress.phase("training"):
                phase.advance()
    assert _shown(console) == "blocks: 2/2 done in 0.0 s\n"


@pytest.mark.parametrize("kind", [PlainProgress, LiveProgress])
def test_phase_that_fails_is_not_called_done(kind):
    console = _console(terminal=kind is LiveProgress)
    with pytest.raises(ZeroDivisionError), kind(console).phase("blocks", 2) as phase:
        phase.advance(1 // 0)
    assert "done" not in _shown(console)


def test_live_nests_and_can_be_used_again():
    console = _console(terminal=True)
    progress = LiveProgress(console)
    for name in ("first", "second"):
        with progress.phase(name, 2) as outer:
            with progress.phase(f"inner of {name}") as inner:
                inner.advance(detail="loss 0.5")
            progress.note("a fact about model[1]")
            outer.advance(2)
    shown = _shown(console)
    for expected in ("✓ first: 2/2 done in", "✓ second: 2/2 done in", "inner of second", "a fact about model[1]"):
        assert expected in shown
    assert "✓ inner" not in shown


def test_warnings_are_marked_and_notes_are_not():
    console = _console()
    progress = PlainProgress(console)
    progress.note("resumed")
    progress.warn("block 3 fell back")
    assert _shown(console) == "resumed\nwarning: block 3 fell back\n"


def test_quiet_keeps_warnings_alone():
    console = _console()
    progress = QuietProgress(console)
    with progress.phase("blocks", 2) as phase:
        phase.advance()
    progress.note("resumed")
    progress.warn("block 3 fell back")
    assert _shown(console) == "warning: block 3 fell back\n"
