"""llm-compressor's GPTQ on a model folder: prints seconds of the quantization alone, model and samples being loaded."""

import json
import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM

task = json.loads(sys.argv[1])
torch.set_num_threads(task["threads"])
model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16).eval()
tokens = torch.load(task["tokens"])[: task["samples"]]
samples = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
weights = QuantizationArgs(
    num_bits=task["bits"], type="int", symmetric=False, strategy="group", group_size=task["group_size"]
)
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
wall, cpu = time.perf_counter(), time.process_time()
oneshot(
    model=model,
    dataset=samples,
    recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
    max_seq_length=tokens.shape[1],
    num_calibration_samples=len(tokens),
)
print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))
