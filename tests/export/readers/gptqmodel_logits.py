"""Logits of a GPTQ folder by gptqmodel's Torch kernel: ``gptqmodel_logits.py DIR TOKENS.npy OUT.npy DTYPE``."""

import os
import sys

# Compiling takes minutes, and gains nothing in one pass.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel

folder, tokens, out, dtype = sys.argv[1:]
# Its loader takes the half precisions only; the kernel itself also computes in float32.
half = torch.bfloat16 if dtype == "bfloat16" else torch.float16
loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=half)
loaded.model.to(getattr(torch, dtype))
kernels = {type(module).__name__ for module in loaded.model.modules() if hasattr(module, "qweight")}
if len(kernels) != 1:
    sys.exit(f"not one kernel: {kernels}")
with torch.no_grad():
    logits = loaded.model(torch.from_numpy(np.load(tokens))).logits
np.save(out, logits.float().numpy())
