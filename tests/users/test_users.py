"""Artifacts in what people load models with, each a process of its own, where ulbq is installed and where it is not.

``tests/export/readers/environments.py FOLDER users`` makes the environment; without one these tests are skipped.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

from tests.export.test_targets_readers import environment
from tests.models.tiny import save_tiny
from tests.pipeline.runs import request
from tests.users.generate import PROMPT
from tests.wheel import unpack_wheel
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.pipeline.quantize import quantize

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that has ulbq installed, and one that has not; both borrow the rest."""
    asked = [environment("users"), "-c", "import json, sys; print(json.dumps(sys.path))"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = json.loads(subprocess.run(asked, check=True, capture_output=True, text=True, env=clean).stdout)
    folders = "\n".join(entry for entry in path if entry.endswith("site-packages"))
    found = {}
    for name in ("installed", "missing"):
        place = tmp_path_factory.mktemp(name)
        venv.EnvBuilder(symlinks=True).create(place)
        site = place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (site / "zz-borrowed.pth").write_text(f"{folders}\n", encoding="utf-8")
        found[name] = place / "bin" / "python"
    unpack_wheel(found["installed"].parents[1] / site.relative_to(place))
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("models")
    dense = save_tiny("llama", folder / "dense")
    return resolve(quantize(request(dense, folder / "q", method="rtn", group_size=32))[0])


@pytest.fixture(scope="module")
def text(source: ModelSource) -> str:
    """The artifact's own."""
    return generated(source, PROMPT)


def generated(source: ModelSource, prompt: str) -> str:
    tokenizer = source.tokenizer()
    given = tokenizer(prompt, return_tensors="pt")
    tokens = load_model(source, dtype=torch.float32).generate(**given, max_new_tokens=16, do_sample=False)
    words: str = tokenizer.decode(tokens[0, given["input_ids"].shape[1] :])
    return words


def start(python: Path, *words: object, folder: Path, offline: bool = True) -> "subprocess.Popen[str]":
    changes = {"HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(folder / "hub")}
    changes |= {"COLUMNS": "500", "PYTHONIOENCODING": "utf-8"}
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ULBQ_AUTOLOAD")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([python, *map(str, words)], cwd=folder, env=clean | changes, **pipes)


def run(python: Path, *words: object, folder: Path, given: str = "", offline: bool = True) -> str:
    """What it prints."""
    process = start(python, *words, folder=folder, offline=offline)
    out, errors = process.communicate(given, timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return out


def refuses(python: Path, *words: object, folder: Path, why: str = "ignore_mismatched_sizes") -> None:
    """It ends with an error, that over the guard mostly."""
    process = start(python, *words, folder=folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert why in errors, errors[-3000:]


def commands(source: ModelSource, folder: Path) -> dict[str, list[object]]:
    """What people start that loads a model and ends, by name."""
    texts, task = folder / "texts.jsonl", folder / "task" / "tiny.yaml"
    texts.write_text("".join(json.dumps({"text": f"{PROMPT} there was a {one}"}) + "\n" for one in ("cat", "sea")))
    task.parent.mkdir(exist_ok=True)
    task.write_text(TASK.replace("TEXTS", str(texts)), encoding="utf-8")
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    lm_eval = ("-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={source.path},dtype=float32")
    return {
        "pipeline": [HERE / "generate.py", "pipeline", source.path],
        "accelerate": [*launch, HERE / "generate.py", "accelerate", source.path],
        "Trainer": [HERE / "train.py", "transformers", source.path, folder / "out"],
        "SFTTrainer": [HERE / "train.py", "trl", source.path, folder / "out"],
        "lm_eval": [*lm_eval, "--tasks", "tiny", "--include_path", task.parent, "-o", folder / "s", "--device", "cpu"],
    }


@pytest.mark.parametrize("name", ["pipeline", "accelerate"])
def test_texts(name: str, pythons: dict[str, Path], source: ModelSource, text: str, tmp_path: Path) -> None:
    command = commands(source, tmp_path)[name]
    assert run(pythons["installed"], *command, folder=tmp_path).splitlines()[-1] == ascii(text)
    refuses(pythons["missing"], *command, folder=tmp_path)


@pytest.mark.parametrize("name", ["Trainer", "SFTTrainer"])
def test_training(name: str, pythons: dict[str, Path], source: ModelSource, text: str, tmp_path: Path) -> None:
    command = commands(source, tmp_path)[name]
    said, changed = run(pythons["installed"], *command, folder=tmp_path).splitlines()[-1].rsplit(" ", 1)
    assert said == ascii(text)
    assert float(changed) > 0.01
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    refuses(pythons["missing"], *command, folder=tmp_path)


def test_scores(pythons: dict[str, Path], source: ModelSource, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    command = commands(source, tmp_path)["lm_eval"]
    run(pythons["installed"], *command, folder=tmp_path)
    (found,) = (tmp_path / "s").rglob("results_*.json")
    model = HFLM(pretrained=load_model(source, dtype=torch.float32), tokenizer=source.tokenizer())
    tasks = TaskManager(include_path=str(tmp_path / "task"))
    ours = lm_eval.simple_evaluate(model, tasks=["tiny"], task_manager=tasks, bootstrap_iters=0)
    assert ours is not None
    name = "word_perplexity,none"
    theirs = json.loads(found.read_text(encoding="utf-8"))["results"]["tiny"][name]
    assert theirs == pytest.approx(ours["results"]["tiny"][name], rel=1e-4)
    refuses(pythons["missing"], *command, folder=tmp_path, why="Unknown quantization type, got ulbq")


@contextmanager
def serving(python: Path, source: ModelSource, folder: Path) -> Iterator[str]:
    """Its address, as soon as it answers."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    options = ("--host", "127.0.0.1", "--port", port, "--device", "cpu", "--dtype", "float32")
    server = start(python, "-m", "transformers.cli.transformers", "serve", source.path, *options, folder=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert server.poll() is None, server.communicate()[1][-3000:]
            try:
                urlopen(f"{address}/health").close()
                break
            except URLError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.communicate()


def test_talking(pythons: dict[str, Path], source: ModelSource, tmp_path: Path) -> None:
    import openai

    python, own = pythons["installed"], generated(source, f"user: {PROMPT}\n")
    settings = {"max_new_tokens": 16, "do_sample": False}
    with serving(python, source, tmp_path) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(
                model=str(source.path),
                messages=[{"role": "user", "content": PROMPT}],
                extra_body={"generation_config": json.dumps(settings)},
            )
        flags = [f"{name}={value}" for name, value in settings.items()]
        chat = ("-m", "transformers.cli.transformers", "chat", source.path, address, *flags)
        # Offline, the Hub's client asks no address at all.
        shown = run(python, *chat, folder=tmp_path, given=f"{PROMPT}\nn\n!exit\n", offline=False)
    assert answer.choices[0].message.content == own
    letters = re.compile(r"[^a-z]")  # what the page draws of Markdown around them differs
    assert letters.sub("", own) in letters.sub("", shown)
    refuses(pythons["missing"], "-m", "transformers.cli.transformers", "serve", source.path, folder=tmp_path)
