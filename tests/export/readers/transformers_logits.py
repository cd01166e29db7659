"""Logits of a packed model by transformers alone: ``transformers_logits.py DIR TOKENS.npy OUT.npy DTYPE``.

An adapter in ``DIR/adapter`` is put beside it by peft.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# Compiling takes minutes, and gains nothing in one pass.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch
from transformers import AutoModelForCausalLM

folder, tokens, out, dtype = sys.argv[1:]
stored = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
chosen: dict[str, Any] = {}
if stored["quant_method"] == "gptq":
    from transformers import GPTQConfig

    # What it would choose by itself compiles for minutes.
    chosen["quantization_config"] = GPTQConfig(bits=stored["bits"], backend="gptq_torch")
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=getattr(torch, dtype), local_files_only=True, device_map="cpu", **chosen
)
if "ulbq" in sys.modules:
    sys.exit("this is not transformers' own load")
if Path(folder, "adapter").is_dir():
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, f"{folder}/adapter")
with torch.no_grad():
    logits = model(torch.from_numpy(np.load(tokens))).logits
np.save(out, logits.float().numpy())
