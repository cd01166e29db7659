"""The command ``quantize``: what it shows and refuses before any work."""

from tests.models.tiny import save_tiny
from ulbq.commands.app import main


def test_brackets_in_a_name_are_no_markup(tmp_path, capsys):
    source = save_tiny("llama", tmp_path / "m[")
    words = ["quantize", str(source), "--group-size", "32", "--calibration", "a[/red].txt", "--device", "cpu"]
    assert main([*words, "--offline", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "m[: 3 blocks" in captured.err
    assert "a[/red].txt" in captured.err
