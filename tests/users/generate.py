"""What ``accelerate launch`` and a Python of others start: ``generate.py HOW DIR``, which prints a greedy text."""

import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

PROMPT = "once upon a time"


def main() -> None:
    how, folder = sys.argv[1:]
    asked = {"max_new_tokens": 16, "do_sample": False}
    if how == "pipeline":
        speak = pipeline("text-generation", model=folder, dtype=torch.float32, device="cpu")
        print(ascii(speak(PROMPT, **asked, return_full_text=False)[0]["generated_text"]))
        return
    accelerator, tokenizer = Accelerator(cpu=True), AutoTokenizer.from_pretrained(folder)
    model = accelerator.prepare(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    given = tokenizer(PROMPT, return_tensors="pt")
    print(ascii(tokenizer.decode(model.generate(**given, **asked)[0, given["input_ids"].shape[1] :])))


if __name__ == "__main__":
    main()
