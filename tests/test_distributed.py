"""Two and four processes on the CPU come to what one comes to; who fails fails for all."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
from safetensors.torch import load_file

from tests import together
from tests.pipeline.runs import logits
from tests.processes import run
from tests.told import Told
from ulbq import distributed
from ulbq.artifacts.manifest import QuantizedManifest, read_manifest
from ulbq.artifacts.whole import verify
from ulbq.commands.app import _as_ulbq_error
from ulbq.errors import ResourceError, UsageError
from ulbq.pipeline.quantize import plan
from ulbq.sensitivity import Saliency

ROOT = Path(__file__).parents[1]


def torchrun(*words: object, cwd: Path = ROOT, count: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a module in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    given = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *map(str, words)],
        cwd=cwd,
        env=os.environ | given,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def forked(file: str, *words: object, cwd: Path = ROOT) -> Told:
    """The same with a file, by children of this process, which have all libraries imported."""
    asked = ["--standalone", "--nproc-per-node", "2", "--start-method", "fork", "--run-path", str(ROOT / file)]

    def launch() -> int:
        torch.distributed.run.main([*asked, *map(str, words)])
        return 0

    return run([launch], cwd)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    together.prepare(folder)
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def count(request: pytest.FixtureRequest) -> int:
    """How many processes there are."""
    return int(request.param)


@pytest.fixture(scope="module")
def two(inputs: Path, count: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes, or four, made of every piece of work."""
    folder = tmp_path_factory.mktemp("two")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    works = [partial(together.as_one_of, rank, count, port, inputs, folder) for rank in range(count)]
    done = run(works, ROOT)
    assert not done.code, done.err
    return folder


@pytest.fixture
def pair(request: pytest.FixtureRequest, inputs: Path, two: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Folders with what one process and several made of the piece of work that the test names."""
    together.do(request.param, inputs, tmp_path)
    return tmp_path / request.param, two / request.param


def work(name: str) -> Any:
    return pytest.mark.parametrize("pair", [name], indirect=True)


def quantized(folder: Path) -> QuantizedManifest:
    verify(folder / "q")
    manifest = read_manifest(folder / "q")
    assert isinstance(manifest, QuantizedManifest)
    return manifest


def distance(one: Path, two: Path) -> float:
    """Relative difference of the logits of two quantized models."""
    expected = logits(one / "q")
    return ((logits(two / "q") - expected).norm() / expected.norm()).item()


def different_codes(one: Path, two: Path) -> float:
    """Share of different codes in the first block, which knows nothing of differences before it."""
    stored = [load_file(folder / "q" / "model-block-00000.safetensors") for folder in (one, two)]
    pairs = [(stored[0][name], stored[1][name]) for name in stored[0] if name.endswith(".codes")]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@work("rtn")
def test_layers_that_are_rounded_are_shared(pair: tuple[Path, Path]) -> None:
    stored = [[(file.name, file.read_bytes()) for file in sorted((one / "q").glob("*.safetensors"))] for one in pair]
    assert stored[0] == stored[1]


@work("claq")
def test_layers_that_are_clustered_are_shared(pair: tuple[Path, Path], two: Path) -> None:
    for file in (two / "claq" / "q").glob("model-block-*.safetensors"):
        assert file.read_bytes() == (two / "unshared" / "q" / file.name).read_bytes()
    # A sum in another order may end the clusters of a column elsewhere.
    errors = [sum(layer.error for layer in quantized(folder).layers) for folder in pair]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@work("trellis")
def test_layers_that_are_coded_are_shared(pair: tuple[Path, Path]) -> None:
    one, two = map(quantized, pair)
    assert [layer.error for layer in two.layers] == pytest.approx([layer.error for layer in one.layers], rel=0.02)
    assert distance(*pair) < 0.05


@work("gptq")
def test_second_moments_are_summed(pair: tuple[Path, Path], count: int) -> None:
    one, two = map(quantized, pair)
    assert (one.processes, two.processes) == (1, count)
    assert one.fingerprint == two.fingerprint
    # A sum in another order may turn a code, and a turned code all that are made good after it.
    assert different_codes(*pair) < 0.02
    assert [layer.error for layer in two.layers] == pytest.approx([layer.error for layer in one.layers], rel=0.02)


@work("parted")
def test_all_go_on_with_what_one_process_solved(pair: tuple[Path, Path], count: int) -> None:
    _, two = map(quantized, pair)
    assert two.processes == count
    assert different_codes(*pair) < 0.02


@work("drift")
def test_what_has_become_of_inputs_is_summed(pair: tuple[Path, Path], two: Path) -> None:
    # Of the first block: a code that a sum in another order turns moves the weights of all layers after it.
    assert different_codes(*pair) < 0.02
    assert different_codes(two / "drift", two / "gptq") > 0.1


@pytest.mark.parametrize("pair", ["efficientqat", "uniform", "apiq", "ulb-sapr", "db-llm", "binary-mos"], indirect=True)
def test_blocks_train_as_in_one_process(pair: tuple[Path, Path]) -> None:
    one, two = map(quantized, pair)
    for alone, both in zip(one.blocks, two.blocks, strict=True):
        assert both.end_error < both.start_error
        assert both.start_error == pytest.approx(alone.start_error, rel=1e-4)
        assert both.end_error == pytest.approx(alone.end_error, rel=1e-4)
        assert (both.steps, both.retries) == (alone.steps, alone.retries)
    assert distance(*pair) < 1e-3


@pytest.mark.parametrize("name", sorted(together.BLOCKS))
def test_blocks_train_in_parts(name: str, two: Path) -> None:
    plain, parts = (quantized(two / folder) for folder in (name, f"{name} sharded"))
    for one, other in zip(plain.blocks, parts.blocks, strict=True):
        assert other.end_error == pytest.approx(one.end_error, rel=1e-3)
        assert (other.steps, other.retries) == (one.steps, one.retries)
    # One tipped code of a trellis tips those after it.
    assert distance(two / name, two / f"{name} sharded") < (0.05 if name == "trellis" else 1e-3)


@work("efficientqat")
def test_a_temperature_is_fitted_to_all_samples(pair: tuple[Path, Path]) -> None:
    alone, both = (quantized(folder).temperature for folder in pair)
    assert alone is not None
    assert both is not None
    assert both.factor != 1
    assert both.factor == pytest.approx(alone.factor, rel=1e-4)
    assert both.end_error == pytest.approx(alone.end_error, rel=1e-4)


@work("end-to-end")
def test_the_whole_model_trains_as_in_one_process(pair: tuple[Path, Path]) -> None:
    alone, both = (quantized(folder).end_to_end for folder in pair)
    assert alone is not None
    assert both is not None
    assert both.epochs > 0
    assert (both.epochs, both.steps) == (alone.epochs, alone.steps)
    assert both.start_error == pytest.approx(alone.start_error, rel=1e-5)
    assert both.start_error - both.end_error == pytest.approx(alone.start_error - alone.end_error, rel=0.05)
    assert distance(*pair) < 1e-3


@work("sharded")
def test_processes_that_hold_parts_of_a_model_train_it_as_one_does(
    pair: tuple[Path, Path], inputs: Path, count: int
) -> None:
    alone, both = (json.loads((folder / "found.json").read_text()) for folder in pair)
    for found in both.values():
        assert 1 / count <= found["held"] < 1.15 / count
    going_on = together.goes_on_alone(inputs, pair[1])
    for found in (both["ended"], going_on):
        for kind in ("losses", "evaluations"):
            expected = [loss for _, loss in alone["ended"]["last"][kind]]
            assert [loss for _, loss in found["last"][kind]] == pytest.approx(expected, rel=1e-4)
    states = [load_file(pair[0] / "step-0000004.safetensors"), load_file(pair[1] / "step-0000004.safetensors")]
    for name, tensor in states[0].items():
        if not name.startswith("generator"):
            assert (states[1][name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.parametrize("pair", ["sharded end-to-end", "sharded mixture"], indirect=True)
def test_a_packed_model_and_its_teacher_are_sharded(pair: tuple[Path, Path]) -> None:
    alone, both = (quantized(folder).end_to_end for folder in pair)
    assert alone is not None
    assert both is not None
    assert (both.epochs, both.steps) == (2, alone.steps)
    assert both.start_error == pytest.approx(alone.start_error, rel=1e-5)
    assert both.start_error - both.end_error == pytest.approx(alone.start_error - alone.end_error, rel=0.05)
    assert distance(*pair) < 1e-3


@work("sharded finetune")
def test_an_adapter_and_scales_of_a_sharded_model_learn_as_in_one_process(pair: tuple[Path, Path]) -> None:
    alone, both = (quantized(folder).finetune for folder in pair)
    assert alone is not None
    assert both is not None
    assert [loss for _, loss in both.losses] == pytest.approx([loss for _, loss in alone.losses], rel=1e-3)
    assert both.end_loss == pytest.approx(alone.end_loss, rel=1e-3)
    assert distance(*pair) < 1e-3


@work("finetune")
def test_an_adapter_learns_as_in_one_process(pair: tuple[Path, Path]) -> None:
    alone, both = (quantized(folder).finetune for folder in pair)
    assert alone is not None
    assert both is not None
    assert both.end_loss < 0.9 * both.start_loss
    assert both.steps == alone.steps
    assert both.start_loss == pytest.approx(alone.start_loss, rel=1e-5)
    assert [loss for _, loss in both.losses] == pytest.approx([loss for _, loss in alone.losses], rel=1e-3)
    assert both.end_loss == pytest.approx(alone.end_loss, rel=1e-3)


@work("saliency")
def test_scores_are_summed(pair: tuple[Path, Path]) -> None:
    manifests = [read_manifest(folder / "s") for folder in pair]
    assert manifests[1].loss == pytest.approx(manifests[0].loss, rel=1e-5)
    alone, both = (Saliency(folder / "s", found.layers) for folder, found in zip(pair, manifests, strict=True))
    for layer in manifests[0].layers:
        # Stored in bfloat16.
        torch.testing.assert_close(both.score(layer.name), alone.score(layer.name), rtol=2**-7, atol=1e-9)


@work("evaluation")
def test_measurements_are_those_of_one_process(pair: tuple[Path, Path]) -> None:
    alone, both = (json.loads((folder / "found.json").read_text()) for folder in pair)
    for name in ("perplexity", "one window", "fidelity"):
        for key, value in alone[name].items():
            assert both[name][key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4))
    assert [score for score, _ in both["scores"]] == pytest.approx([score for score, _ in alone["scores"]], rel=1e-4)
    assert both["answers"] == alone["answers"]


@work("primitives")
def test_sums_over_what_some_lack(pair: tuple[Path, Path], count: int) -> None:
    (alone,), both = (json.loads((folder / "found.json").read_text()) for folder in pair)
    for rank, found in enumerate(both):
        for name in ("mean", "mean of one", "held", "idle", "caught"):
            assert found[name] == alone[name]
        assert found["total"] == [5, count / 2]
        assert not found["agreed"]
        assert found["rows"] == [row // count for row in (4, 1, 0) if row % count == rank]
        assert found["fewest"] == (4 if count == 2 else 1)
        assert found["shared"] == [[0.0], [1.0], [2.0]]
    assert alone["agreed"]
    assert "double quotes" in alone["caught"]


@pytest.mark.parametrize(
    ("pair", "left"),
    [("gptq", "interrupted"), ("efficientqat sharded", "interrupted sharded")],
    indirect=["pair"],
)
def test_one_process_goes_on_with_what_two_began(pair: tuple[Path, Path], left: str, inputs: Path, two: Path) -> None:
    began = two / left
    first = (began / "q.partial" / "model-block-00000.safetensors").read_bytes()
    together.resumed(inputs, began, pair[0].name.removesuffix(" sharded"))
    assert (began / "q" / "model-block-00000.safetensors").read_bytes() == first
    assert quantized(began).processes == 1
    assert different_codes(pair[0], began) < 0.02


def test_the_command_line_gives_one_path(inputs: Path, tmp_path: Path) -> None:
    words = ["quantize", inputs / together.MODEL, "--method", "rtn", "--group-size", 32, "--device", "cpu", "-o", "q"]
    done = torchrun("ulbq", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "q\n"
    assert done.stderr.count("3/3 done") == 1
    assert read_manifest(tmp_path / "q").processes == 2


def test_who_fails_alone_speaks_for_all(inputs: Path, tmp_path: Path) -> None:
    words = ["quantize", inputs / together.MODEL, "--method", "gptq", "--group-size", 32, "--device", "cpu"]
    data = ["--calibration", inputs / together.TOKENS, "--samples", 4, "--sequence-length", 32, "-o", tmp_path / "q"]
    done = forked("tests/together.py", *words, *data)
    assert done.code
    assert done.out == ""
    assert done.err.count("error:") == 1
    assert "The second one stumbles." in done.err
    assert "exitcode  : 3" in done.err.partition("Root Cause")[2]
    assert not (tmp_path / "q").exists()


def test_what_all_refuse_is_said_once(tmp_path: Path) -> None:
    done = forked("ulbq/__main__.py", "convert", "q", cwd=tmp_path)
    assert done.err.count("error: 'ulbq convert' does not split its work over processes.") == 1
    assert "exitcode  : 2" in done.err.partition("Root Cause")[2]


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [(5, {}, "4 samples cannot be split over 5"), (2, {"sliced_wasserstein": 0.1}, "compares all tokens of a batch")],
)
def test_what_several_processes_cannot_do_is_refused(
    count: int, options: dict[str, Any], words: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_world", distributed._World(0, count, None))
    asked = together._request(inputs, tmp_path / "q", method="ulb-sapr", samples=4, **options)
    with pytest.raises(UsageError, match=words):
        plan(asked)


@pytest.mark.parametrize("values", [("1", "1", "0"), ("0", "two", "0"), ("-1", "2", "0")])
def test_an_environment_that_makes_no_sense_is_refused(
    values: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), values, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UsageError, match="make no sense"), distributed.joined():
        pass


def test_who_is_alone_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")  # where nobody listens
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(distributed, "_MEETING", timedelta(seconds=1))
    with pytest.raises(ResourceError, match="2 processes of this run cannot reach each other"), distributed.joined():
        pass


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    world = distributed._World(1, 2, None, gpu=1)
    monkeypatch.setattr(distributed, "_world", world)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    distributed.check_device(torch.device("cuda"))
    distributed.check_device(torch.device("cuda:1"))
    distributed.check_device(torch.device("cpu"))
    with pytest.raises(UsageError, match="cuda:0"):
        distributed.check_device(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match="more processes on this machine than its 1 GPUs"):
        distributed.check_device(torch.device("cuda"))
    # As Slurm shows each task one GPU; two processes may see the same.
    world.gpu = 0
    distributed.check_device(torch.device("cuda:0"))
    world.shared_gpu = True
    with pytest.raises(ResourceError, match="more processes"):
        distributed.check_device(torch.device("cuda"))


@pytest.mark.parametrize(
    ("module", "kind", "early"),
    [
        ("torch.distributed.distributed_c10d", RuntimeError, True),
        ("torch.distributed.distributed_c10d", torch.OutOfMemoryError, False),
        ("torch.nn.modules.linear", RuntimeError, False),
    ],
)
def test_a_process_that_is_gone_is_told_from_a_defect(
    module: str, kind: type[RuntimeError], early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    within: dict[str, Any] = {"__name__": module, "kind": kind}
    exec("def wait():\n    raise kind('Connection reset by peer')", within)
    with pytest.raises(kind) as caught:
        within["wait"]()
    assert distributed.ended_early(caught.value) is None
    monkeypatch.setattr(distributed, "_world", distributed._World(0, 2, None))
    found = _as_ulbq_error(caught.value)
    assert (found is not None and "ended early" in found.message) == early
