"""The commands as a user types them, in processes of their own, on a tiny model."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.processes import shell, start, ulbq, wait
from tests.told import Told
from ulbq.models.load import load_model
from ulbq.models.source import resolve

ULBQ = f"{shlex.quote(sys.executable)} -c 'import sys; from ulbq.commands.app import main; sys.exit(main())'"
SMALL = "--group-size 32 --samples 6 --sequence-length 32 --epochs 2 --device cpu --offline"


def from_nothing(line: str, folder: Path) -> Told:
    """Run a line in a shell with ``pipefail``: each ``ulbq`` is this environment's own, and imports what it needs."""
    script = f'set -o pipefail; ulbq() {{ {ULBQ} "$@"; }}; {line}'
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    return Told(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "far", "into", "woods"]
    path.write_text("\n\n".join(" ".join(words[i:] + words[:i]) for i in range(len(words))) * 4)
    return path


def test_the_chain_of_the_readme(tiny_llama: Path, text: Path, data_dir: Path, tmp_path: Path) -> None:
    chain = from_nothing(
        f"ulbq quantize {tiny_llama} --method db-llm {SMALL} --calibration {text}"
        f" | ulbq eval --tasks piqa --limit 4 --device cpu --offline --data-dir {data_dir}",
        tmp_path,
    )
    assert chain.code == 0, chain.err
    evaluation = tmp_path / chain.out.strip()
    assert chain.out == f"{evaluation.relative_to(tmp_path)}\n"
    results = json.loads((evaluation / "results.json").read_text())
    (scored,) = [model for model in results["models"] if model["subject"]["method"] == "db-llm"]
    assert "piqa" in scored["tasks"]
    assert (evaluation / "report.html").stat().st_size > 1000

    newest = shell("ulbq convert --to dense --dtype fp32 -o dense --offline", tmp_path)
    assert newest.code == 0, newest.err
    assert newest.out == "dense\n"
    looked = shell("ulbq inspect dense --verify --json", tmp_path)
    assert json.loads(looked.out)["parents"][0]["kind"] == "quantized"


def test_json_gives_the_manifest_and_nothing_else(tiny_llama: Path, tmp_path: Path) -> None:
    done = shell(f"ulbq quantize {tiny_llama} --method rtn --group-size 32 -o q --json", tmp_path)
    assert json.loads(done.out) == json.loads((tmp_path / "q" / "manifest.json").read_text())


def test_a_failed_command_stops_the_chain_with_its_own_code(tmp_path: Path) -> None:
    chain = shell("ulbq quantize nowhere/at/all --method rtn | ulbq eval", tmp_path)
    assert chain.code == 3
    assert chain.out == ""
    assert chain.err.count("error:") == 2
    assert list(tmp_path.iterdir()) == []


def test_four_bits_converted_to_dense_give_transformers_the_same_logits(tiny_llama: Path, tmp_path: Path) -> None:
    done = shell(
        f"ulbq quantize {tiny_llama} --method rtn --bits 4 --group-size 32 -o q | ulbq convert --to dense -o dense",
        tmp_path,
    )
    assert done.code == 0, done.err
    tokens = torch.arange(3, 67).view(2, 32)
    with torch.no_grad():
        packed = load_model(resolve(tmp_path / "q"), dtype=torch.bfloat16)(tokens).logits
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)(tokens).logits
    # The dense weights are rounded to bfloat16, the packed ones run as they are.
    assert (packed.float() - dense.float()).norm() < 0.02 * dense.float().norm()


def test_a_killed_run_goes_on_to_the_same_bytes(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    asked = f"ulbq quantize {tiny_llama} --method db-llm {SMALL} --epochs 12 --calibration {text} -q"
    straight = shell(f"{asked} -o straight", tmp_path)
    assert straight.code == 0, straight.err

    with open(os.devnull, "r+b") as nothing:
        process = start(ulbq(*shlex.split(asked), "-o", "killed"), tmp_path, (nothing.fileno(),) * 3)
    journal = tmp_path / "killed.partial" / ".journal.jsonl"
    deadline = time.monotonic() + 120
    # A header, then a line a block: two lines are one finished block.
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    assert wait(process) == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()

    resumed = shell(f"{asked} -o killed", tmp_path)
    assert resumed.code == 0, resumed.err
    for path in sorted((tmp_path / "straight").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name


def test_an_artifact_from_a_pipe_is_fine_tuned(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {word}", "completion": f"{word} {word}"} for word in "abcdefgh"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune = "ulbq finetune --task end-to-end --data pairs.jsonl --samples 4 --sequence-length 24 --lr-factor 2 --offline"
    chain = shell(f"ulbq quantize {tiny_llama} --method rtn --bits 3 --group-size 32 -o q | {tune}", tmp_path)
    assert chain.code == 0, chain.err
    assert chain.out == "artifacts/q-end-to-end\n"
    # Without a source and a pipe: the newest artifact, which is the one just made.
    again = shell(f"{tune} --loss kl --seed 1 --json", tmp_path)
    assert again.code == 0, again.err
    manifest = json.loads(again.out)
    assert "taking the newest artifact, artifacts/q-end-to-end" in " ".join(again.err.split())
    assert (manifest["method"], manifest["end_to_end"]["loss"]) == ("rtn", "kl")
    assert manifest["end_to_end"]["data"]["name"] == "pairs.jsonl"
    piped = shell(
        "ulbq inspect q -q | ulbq finetune - --task end-to-end --data pairs.jsonl --samples 4 --sequence-length 24 "
        "--offline -o last -q | ulbq inspect - --json",
        tmp_path,
    )
    assert json.loads(piped.out)["name"] == "last"
