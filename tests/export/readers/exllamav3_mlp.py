"""Run the first block's MLP of an EXL3 folder through exllamav3's code for CPUs: FOLDER INPUTS OUT.

The package itself wants a GPU. What it has for experts that stay on the CPU is one C++ file of its own, which is
compiled here; a gated MLP is one expert to it.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.cpp_extension import load_inline

# In single precision; its other kernels round inputs to eight bits.
os.environ["EXL3_MOE_CPU_MAX_ISA"] = "scalar"

_, folder, inputs, out = sys.argv
package = importlib.util.find_spec("exllamav3")
assert package is not None
assert package.origin is not None
cpu = load_inline(
    "exllamav3_cpu",
    '#include "moe_mul1.cpp"',
    functions=["exl3_moe_cpu_make_layer", "exl3_moe_cpu_forward"],
    extra_include_paths=[str(Path(package.origin).parent / "exllamav3_ext" / "cpu")],
    extra_cflags=["-O1"],
)
tensors = {}
for file in Path(folder).glob("*.safetensors"):
    with safe_open(file, framework="pt") as opened:
        tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
parts = [
    [tensors[f"model.layers.0.mlp.{layer}_proj.{part}"]]
    for layer in ("gate", "up", "down")
    for part in ("trellis", "suh", "svh")
]
layer = cpu.exl3_moe_cpu_make_layer(*parts, [], [], [], 0, 0.0, 0)
rows = torch.from_numpy(np.load(inputs)).half()
answers = torch.zeros(rows.shape, dtype=torch.float32)
expert, weight = torch.zeros(len(rows), 1, dtype=torch.int64), torch.ones(len(rows), 1, dtype=torch.float16)
cpu.exl3_moe_cpu_forward(layer, rows, expert, weight, answers, 1)
np.save(out, answers.numpy())
