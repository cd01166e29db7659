"""Tokens by llama.cpp: ``llama_cpp_tokens.py MODEL.gguf TEXTS.json OUT.json``, a list of ids for each text."""

import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp

model, texts, out = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx = 256
params.n_parallel = 1
params.warmup = False
params.cpuparams.n_threads = 1
params.verbosity = 0
server = xllamacpp.Server(params)
found = []
for text in json.loads(Path(texts).read_text(encoding="utf-8")):
    asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", data=asked, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        found.append(json.load(answer)["tokens"])
Path(out).write_text(json.dumps(found), encoding="utf-8")
