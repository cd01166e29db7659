"""AutoRound 0.16, for ``block_time.py``; runs with the Python of an environment that has ``auto-round``, not ours.

Rounding offsets and clip factors learn by sign descent, as its defaults have it, 2-bit asymmetric; its own block loop
runs as it is, under a clock. The samples go in as they are: its data loading would only tokenize the same text.
"""

import time
from functools import wraps
from typing import Any

import torch
from lap import Done, Laps


def main() -> None:
    """Quantize the first blocks."""
    laps = Laps()
    task = laps.task
    torch.set_num_threads(task["threads"])
    from auto_round import AutoRound, calib_dataset
    from auto_round.algorithms.composer import AlgorithmComposer
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.load(task["tokens"])[: task["samples"]]
    dtype = torch.bfloat16 if task["precision"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype)
    steps = task["passes"] * len(tokens) // task["batch_size"]

    def batches(*args: Any, **kwargs: Any) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": part} for part in tokens.split(task["batch_size"])]

    calib_dataset.get_dataloader = batches
    compress, quantize = AlgorithmComposer.compress_block, SignRoundQuantizer.quantize_block
    index = 0

    @wraps(compress)
    def lap(*args: Any, **kwargs: Any) -> Any:
        nonlocal index
        laps.start(index)
        result = compress(*args, **kwargs)
        laps.finish(steps)
        index += 1
        return result

    @wraps(quantize)
    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        result = quantize(*args, **kwargs)
        laps.add("training", time.perf_counter() - begun)
        return result

    AlgorithmComposer.compress_block, SignRoundQuantizer.quantize_block = lap, timed
    options = {} if task["compile"] is None else {"enable_torch_compile": task["compile"]}
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(task["model"]),
        scheme=f"W{task['bits']}A16",
        sym=False,
        group_size=task["group_size"],
        iters=steps,
        batch_size=task["batch_size"],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset="samples",
        device_map=task["device"],
        amp=task["precision"] == "bf16",
        seed=0,
        **options,
    )
    try:
        rounder.quantize()
    except Done:
        return


if __name__ == "__main__":
    main()
