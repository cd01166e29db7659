"""Commands on the pretended GPU, in the process that this file becomes: ``python -m tests.pretended.cases GUARD OUT``.

Runs in a folder of its own and leaves there what the commands make. ``OUT`` gets a JSON object with, for each case, the
exit code, what it said on standard error, seconds, and how often it waited for the device, by our function.
"""

import contextlib
import ctypes
import gc
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SMALL = "--device cuda --offline"
SAMPLES = "--calibration tokens.safetensors --samples 4 --sequence-length 16"
CALIBRATED = f"{SMALL} {SAMPLES} --activation-memory 1K"
BLOCKS = f"{CALIBRATED} --group-size 32 --set batch_size=2 --set micro_batch=1"
TRAINED = f"{BLOCKS} --epochs 1"
SOLVED = f"quantize base {CALIBRATED}"
LITTLE = 20_000
"""Bytes of a device that has no room for two blocks."""
END = "--set end_to_end_epochs=1 --set gradient_accumulation=2 --set end_to_end_samples=4"

CASES: dict[str, str] = {
    # Scores first: some of what follows reads them.
    **{
        f"saliency {kind}": f"saliency base {CALIBRATED} --kind {kind} -o {kind}"
        for kind in ("fisher", "gradient", "hessian", "wanda")
    },
    "saliency magnitude": f"saliency base {SMALL} --kind magnitude -o magnitude",
    "rtn": f"quantize base {SMALL} --method rtn --bits 3 --group-size 32 --embedding-bits 4 --head-bits 8 -o rtn",
    "rtn symmetric": f"quantize base {SMALL} --method rtn --bits 2 --group-size 32 --symmetric -o rtn-symmetric",
    "gptq": f"quantize deep {CALIBRATED} --method gptq --bits 2 --group-size 32 -o gptq",
    "gptq guided": f"{SOLVED} --method gptq --bits 2 --group-size 32 --hessian guided --only q_proj --allow-partial "
    "--target-inputs full --rotate -o guided",
    "gptq one pass": f"{SOLVED} --method gptq --bits 3 --group-size 32 --no-act-order --one-pass -o one-pass",
    "gptq experts": f"quantize moe {CALIBRATED} --method gptq --bits 2 --group-size 32 --all-experts -o experts",
    "claq": f"{SOLVED} --method claq --target-bits 4.6 --sweeps 1 --only q_proj --allow-partial -o claq",
    "claq trained": f"{SOLVED} --method claq --bits 2 --epochs 1 --set outlier_bits=0.2 --target-bits 4.8 "
    "--only q_proj --allow-partial "
    f"--end-to-end ce {END} -o claq-trained",
    "trellis": f"{SOLVED} --method trellis --bits 2 --epochs 1 --row-feedback --only q_proj --allow-partial -o trellis",
    "efficientqat": f"quantize base {TRAINED} --method efficientqat --bits 2 --end-to-end ce "
    f"--end-to-end-train scales-zeros {END} --fit-temperature -o efficientqat",
    "efficientqat rounding": f"quantize base {TRAINED} --method efficientqat --bits 2 --start gptq --train rounding "
    f"--optimizer sign --end-to-end dad {END} -o rounding",
    "db-llm": f"quantize base {TRAINED} --method db-llm --augmented-loss --end-to-end ce-kl --teacher cached "
    f"--set teacher_top_k=8 {END} -o db-llm",
    "apiq": f"quantize base {TRAINED} --method apiq --bits 2 --rank 4 --dora --dropout 0.2 --granularity layer "
    f"--end-to-end kl {END} -o apiq",
    "ulb-sapr": f"quantize base {TRAINED} --method ulb-sapr --bits 2 --rank 4 --saliency fisher "
    "--sliced-wasserstein 0.1 -o ulb-sapr",
    "binary-mos": f"{SOLVED} --epochs 1 --set batch_size=2 --method binary-mos --experts 2 --zeros output "
    f"--end-to-end kl-hidden --end-to-end-train all {END} -o binary-mos",
    "quantize self": f"quantize base {SMALL} --calibration self --samples 2 --sequence-length 16 --method gptq "
    "--bits 4 --group-size 32 -o self",
    "finetune": f"finetune rtn {SMALL} --task end-to-end --data tokens.safetensors --samples 4 --sequence-length 16 "
    "--loss kl --lr-factor 0.5 -o finetuned",
    "finetune task": f"finetune rtn {SMALL} --task instructions --data pairs.jsonl --samples 4 --sequence-length 24 "
    "--epochs 1 --batch-size 2 --rank 2 --train adapter-scales -o tuned",
    "eval": f"eval rtn {SMALL} --perplexity wikitext2 --data-dir mirror --fidelity --limit 2 --context 32 -o scored",
    "eval streamed": f"eval rtn {SMALL} --perplexity wikitext2 --data-dir mirror --fidelity --limit 2 --context 32 "
    "--stream -o scored-streamed",
    "generate": f"generate rtn {SMALL} --prompt Hello -n 6",
    "generate spread": f"generate gptq {SMALL} --device cuda:0,cpu --prompt Hello -n 6",
    "eval spread": f"eval gptq {SMALL} --device cuda:0,cpu --perplexity wikitext2 --data-dir mirror --limit 2 "
    "--context 32 --no-stream -o scored-spread",
    "generate adapter": f"generate apiq {SMALL} --prompt Hello -n 6 --top-p 0.9 --temperature 0.7",
    "generate kernel by kernel": f"generate rtn {SMALL} --prompt Hello -n 6 --no-cuda-graphs",
    "kernels generate": f"generate rtn {SMALL} --prompt Hello -n 2 --dtype fp32",
    "convert": "convert rtn --to dense --offline -o dense",
    "inspect": "inspect rtn --verify",
    "inspect kernels": "inspect rtn --kernels",
    "sweep": f"sweep base {SMALL} --method rtn --bits 3,4 "
    "--set group_size=32 --perplexity wikitext2 --limit 2 --data-dir mirror --context 32 -o swept",
    "recommend": f"recommend base {SMALL} --bits 4.5",
    "doctor": "doctor",
}
"""Command lines; :func:`prepare` makes what they read."""
TRAINING = (
    *("rtn", "claq trained", "efficientqat", "efficientqat rounding", "db-llm", "apiq", "ulb-sapr", "binary-mos"),
    *("finetune", "finetune task", "generate adapter"),
)
GROUPS = {
    "training": [*TRAINING],
    "all else": [name for name in CASES if name == "rtn" or name not in TRAINING],
}
"""What one process does, one after the other: cases read what those before them have made."""


def prepare() -> None:
    """The models, samples and texts that the cases read."""
    import torch
    from safetensors.torch import save_file

    from tests.evaluation.sample import write_mirror
    from tests.models.tiny import save_tiny

    save_tiny("llama", Path("base"), tied=False, num_hidden_layers=1, dtype=torch.bfloat16)
    save_tiny("llama", Path("deep"), num_hidden_layers=2, dtype=torch.bfloat16)
    save_tiny("qwen3_moe", Path("moe"), num_hidden_layers=1, dtype=torch.bfloat16)
    tokens = torch.randint(3, 250, (8, 16), generator=torch.Generator().manual_seed(7))
    save_file({"tokens": tokens.int()}, "tokens.safetensors")
    rows = [{"prompt": f"say {word}", "completion": f"{word} {word}"} for word in "abcdefgh"]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_mirror(Path("mirror"))


def run(name: str, words: list[str]) -> dict[str, Any]:
    """A command as it is typed."""
    from tests.pretended.device import MEMORY, SENT, STEPS, WAITS, interpret_kernels, set_memory
    from ulbq.commands.app import main

    interpret_kernels(name.startswith("kernels"))
    set_memory(LITTLE if name.endswith("spread") else MEMORY)
    WAITS.clear()
    STEPS.clear()
    SENT.clear()
    out, said, begin = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = main([*words, "--debug"])
    seconds = time.process_time() - begin
    return {
        "code": code,
        "said": said.getvalue()[-6000:],
        "seconds": round(seconds, 2),
        "waits": dict(WAITS),
        "steps": dict(STEPS),
        "sent": sorted(SENT),
    }


def work(result: Path, chosen: list[str]) -> None:
    """All cases, or those that are named."""
    from tests.interpreted import quicken
    from tests.pretended.device import pretend

    prepare()
    quicken()
    pretend()
    # Libraries are half a million objects: to look at all of them takes a collection a third of a second.
    gc.collect()
    gc.freeze()
    told = {name: run(name, line.split()) for name, line in CASES.items() if not chosen or name in chosen}
    result.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRITON_INTERPRET": "1"}
    # Torch asks for the hooks once, as it is imported.
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    work(Path(sys.argv[2]), sys.argv[3:])
