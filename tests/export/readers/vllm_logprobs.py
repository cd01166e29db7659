"""Greedy continuations by vLLM: ``vllm_logprobs.py DIR TOKENS.npy OUT.npy DTYPE STEPS MOST [compiled] [adapter]``.

For each row and each of STEPS tokens, what was taken and the MOST likeliest: pairs of token and log-probability.
``compiled`` is by torch.compile, ``adapter`` with the one in ``DIR/adapter`` as vLLM's LoRA.
"""

import os
import sys
from typing import Any

# Processes of its own take minutes, and so does compiling.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
if "compiled" not in sys.argv:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def pairs(step: dict[int, Any], taken: int, most: int) -> list[tuple[int, float]]:
    likeliest = sorted(step, key=lambda token: step[token].rank)[:most]
    return [(token, step[token].logprob) for token in (taken, *likeliest)]


def main() -> None:
    folder, tokens, out, dtype, steps, most, *how = sys.argv[1:]
    model = LLM(
        folder,
        dtype=dtype,
        max_model_len=256,
        max_num_seqs=8,
        max_logprobs=int(most),
        enforce_eager="compiled" not in how,
        enable_lora="adapter" in how,
    )
    asked = SamplingParams(temperature=0, max_tokens=int(steps), logprobs=int(most), ignore_eos=True)
    prompts = [{"prompt_token_ids": row} for row in np.load(tokens).tolist()]
    tuned = LoRARequest("tuned", 1, f"{folder}/adapter") if "adapter" in how else None
    answers = [one.outputs[0] for one in model.generate(prompts, asked, use_tqdm=False, lora_request=tuned)]
    found = [
        [pairs(step, taken, int(most)) for step, taken in zip(answer.logprobs, answer.token_ids, strict=True)]
        for answer in answers
    ]
    np.save(out, np.array(found, dtype=np.float64))


if __name__ == "__main__":
    main()
