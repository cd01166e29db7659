"""Logits of a GPTQ v1 folder by AutoGPTQ 0.7.1: ``auto_gptq_logits.py DIR TOKENS.npy OUT.npy DTYPE``.

The model is loaded by ``AutoGPTQForCausalLM.from_quantized``; its layers are AutoGPTQ's ``QuantLinear`` for the CPU.
"""

import sys

import numpy as np
import torch
from auto_gptq import AutoGPTQForCausalLM

folder, tokens, out, dtype = sys.argv[1:]
model = AutoGPTQForCausalLM.from_quantized(
    folder,
    device="cpu",
    use_safetensors=True,
    use_triton=False,
    disable_exllama=True,
    disable_exllamav2=True,
    inject_fused_attention=False,
    inject_fused_mlp=False,
    torch_dtype=getattr(torch, dtype),
)
kernels = {type(m).__module__ for m in model.modules() if hasattr(m, "qweight")}
if not kernels or not all(name.startswith("auto_gptq.") for name in kernels):
    sys.exit(f"not AutoGPTQ's layers: {kernels}")
with torch.no_grad():
    logits = model(input_ids=torch.from_numpy(np.load(tokens))).logits
np.save(out, logits.float().numpy())
