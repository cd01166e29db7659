"""What a run says, records and warns of its calibration samples."""

import json
from pathlib import Path

from tests.pipeline.runs import request
from ulbq.pipeline.quantize import quantize
from ulbq.progress import Silent


class Listening(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_what_samples_hold_is_said_recorded_and_warned_of(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{number * 7919 % 10007}" for number in range(900)))
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it, it and it again"}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 60)
    size = {"method": "gptq", "bits": 4, "group_size": 32, "samples": 6, "sequence_length": 32}
    told = Listening()
    _, manifest = quantize(request(tiny_llama, tmp_path / "q", calibration=f"{text}:3,{chats}", **size), told)
    assert manifest.calibration["name"] == "text.txt:3,chats.jsonl:1"
    found = manifest.calibration["contents"]
    assert found["tokens"] == 8 * 32
    assert found["chats"] == 0.25
    assert found["special"] == 0.0
    assert found["scripts"] == {"Latin": 1.0}
    assert any(
        note.startswith("Calibration on text.txt:3,chats.jsonl:1: 256 tokens; letters Latin") for note in told.notes
    )
    assert not any("chats alone" in warning for warning in manifest.warnings)

    told = Listening()
    _, manifest = quantize(request(tiny_llama, tmp_path / "c", calibration=str(chats), **size), told)
    said = ("chats alone", "repeats itself")
    assert all(any(words in warning for warning in manifest.warnings) for words in said)
    assert all(any(words in warning for warning in told.warnings) for words in said)
