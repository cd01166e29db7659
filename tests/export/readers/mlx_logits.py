"""Logits by mlx-lm on the CPU: ``mlx_logits.py DIR TOKENS.npy OUT.npy``."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

folder, tokens, out = sys.argv[1:]
mx.set_default_device(mx.cpu)
model, _ = load_model(Path(folder))
np.save(out, np.array(model(mx.array(np.load(tokens))).astype(mx.float32)))
