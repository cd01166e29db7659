"""LoRA beside packed layers, by a trainer of others: ``train.py trl|transformers DIR OUT``.

Prints the text that the base model has afterwards, by itself, and what the adapter changed of the logits.
"""

import sys

import torch
from datasets import Dataset
from generate import PROMPT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

TEXTS = ["the sea is blue and wide", "a lamp in one hand", "bread in the other one"] * 4
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def main() -> None:
    which, folder, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    common = {"output_dir": out, "max_steps": 3, "learning_rate": 1e-2, "use_cpu": True, "report_to": []}
    if which == "trl":
        settings = SFTConfig(**common, max_length=32, bf16=False)
        rows = Dataset.from_dict({"text": TEXTS})
        trainer: Trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, peft_config=LORA)
    else:
        rows = Dataset.from_list([{"input_ids": one, "labels": one} for one in tokenizer(TEXTS)["input_ids"]])
        settings = TrainingArguments(**common, per_device_train_batch_size=1)
        trainer = Trainer(get_peft_model(model, LORA), settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(out)
    trained, given = trainer.model.eval(), tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad(), trained.disable_adapter():
        base = trained(**given).logits
        text = trained.generate(**given, max_new_tokens=16, do_sample=False)[0, given["input_ids"].shape[1] :]
    with torch.no_grad():
        changed = (trained(**given).logits - base).abs().max().item()
    print(ascii(tokenizer.decode(text)), changed)


if __name__ == "__main__":
    main()
