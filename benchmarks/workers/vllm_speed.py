"""vLLM with a model folder, for ``vllm_cpu.py``; runs with the Python of an environment that has vLLM, not ours.

Prints a line of JSON: by the number of requests at once, tokens per second of the best round.
"""

import json
import os
import sys
import time

# In one process, whose clock counts all of its work.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

from vllm import LLM, SamplingParams


def main() -> None:
    """Take a turn with each number of requests, as often as asked."""
    task = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bounds = {"max_model_len": 512, "max_num_seqs": 8, "enable_prefix_caching": False}
    model = LLM(task["folder"], dtype="bfloat16", enforce_eager=task["eager"], **bounds)
    asked = SamplingParams(temperature=0, max_tokens=task["tokens"], ignore_eos=True)
    best: dict[int, dict[str, float]] = {}
    for requests in task["requests"] * task["rounds"]:
        wall, cpu = time.perf_counter(), time.process_time()
        model.generate([task["prompt"]] * requests, asked, use_tqdm=False)
        tokens = requests * task["tokens"]
        turn = {
            "wall_tokens_per_s": tokens / (time.perf_counter() - wall),
            "cpu_tokens_per_s": tokens / (time.process_time() - cpu),
        }
        before = best.setdefault(requests, turn)
        best[requests] = {name: max(value, before[name]) for name, value in turn.items()}
    print(json.dumps(best), file=out, flush=True)


if __name__ == "__main__":
    main()
