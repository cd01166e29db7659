"""Log-probabilities of the next token by llama.cpp: ``llama_cpp_logits.py DIR TOKENS.npy OUT.npy VOCABULARY``.

An ``adapter.gguf`` in DIR is applied. The server gives probabilities and no logits: they compare after a softmax. One
request a row. What is sampled is pushed to a printable token, since the server drops the probabilities of half a
character; they are those before the push.
"""

import json
import sys
from pathlib import Path

import numpy as np
import xllamacpp

folder, tokens, out, vocabulary = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = f"{folder}/model.gguf"
params.n_ctx = 256
params.n_parallel = 1
params.warmup = False
params.cpuparams.n_threads = 1
params.cpuparams_batch.n_threads = 1
params.verbosity = 0
if Path(folder, "adapter.gguf").exists():
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = f"{folder}/adapter.gguf", 1.0
    params.lora_adapters = [adapter]
server = xllamacpp.Server(params)
rows = []
for row in np.load(tokens):
    asked = {
        "prompt": row.tolist(),
        "n_predict": 1,
        "logit_bias": [[40, 1000.0]],
        "n_probs": int(vocabulary),
        "temperature": 0.0,
        "cache_prompt": False,
    }
    answer = server.handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found = np.full(int(vocabulary), -np.inf, dtype=np.float32)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    rows.append(found)
np.save(out, np.stack(rows))
