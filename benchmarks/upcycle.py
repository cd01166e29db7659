"""A trained mixture of experts to measure on: a dense Llama's MLPs copied into experts, routers added, trained apart.

    python benchmarks/upcycle.py OUT [--model SOURCE] [--steps N] [--results FILE]

OUT is a Mixtral folder in Hugging Face layout. Each MLP becomes 8 experts, copies with noise; a router sends every
token to two of them. Routers, experts and norms train on WikiText-2 ``train``, by next-token loss and transformers'
loss for a balanced load, until the experts differ: their mean cosine to each other is printed, and perplexity on 8
windows of ``test`` before and after. The default model gives 692 M weights. Adafactor keeps a row and a column for
each matrix in place of Adam's two copies, and products are in bfloat16. ``benchmarks/mixture.py`` measures on it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from ulbq.data.registry import texts
from ulbq.data.windows import draw_windows, token_stream
from ulbq.evaluation.perplexity import perplexity
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.runtime import calm_threads, versions

WINDOWS, CONTEXT = 8, 512


def main() -> None:
    """Build, train and save the model; print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="a dense Llama; default: the default model")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.2, help="of each copy, relative to its weights")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--samples", type=int, default=4, help="of a step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=3e-3, help="of a step, relative to the weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="write what is printed as JSON")
    options = parser.parse_args()
    calm_threads()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    source = resolve(options.model)
    model = upcycled(source, options.experts, options.noise)
    held = token_stream(texts("wikitext2", "test"), source.tokenizer(), WINDOWS * CONTEXT).view(-1, CONTEXT)
    row: dict[str, Any] = {"before": perplexity(model, held, batch_size=1).value, "cosine before": _likeness(model)}
    started = time.monotonic()
    row["losses"] = _train(model, source, options)
    row |= {"seconds": time.monotonic() - started, "after": perplexity(model, held, batch_size=1).value}
    row |= {"cosine after": _likeness(model), "load": _load(model, held), "versions": versions()}
    model.to(torch.bfloat16).save_pretrained(options.out)
    source.save_tokenizer_files(options.out)
    print(json.dumps(row))
    if options.results:
        options.results.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")


def upcycled(source: ModelSource, experts: int, noise: float) -> MixtralForCausalLM:
    """A Mixtral whose experts are noisy copies of a Llama's MLPs, in float32; everything else is the Llama's."""
    dense = load_model(source, dtype=torch.float32)
    config = dense.config
    if not isinstance(config, LlamaConfig):
        raise SystemExit(f"'{source.given}' is no Llama")
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    ends = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    made = MixtralForCausalLM(
        MixtralConfig(
            **{name: getattr(config, name) for name in (*shared, *more, *ends)},
            num_local_experts=experts,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.02,
        )
    )
    stored = dense.state_dict()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            layer, _, leaf = name.partition(".mlp.experts.")
            if leaf == "gate_up_proj":
                both = [stored[f"{layer}.mlp.{part}.weight"] for part in ("gate_proj", "up_proj")]
                parameter.copy_(torch.cat(both).expand_as(parameter))
            elif leaf == "down_proj":
                parameter.copy_(stored[f"{layer}.mlp.down_proj.weight"].expand_as(parameter))
            elif not name.endswith(".mlp.gate.weight"):
                parameter.copy_(stored[name])
            if leaf:
                parameter.add_(torch.randn_like(parameter), alpha=noise * parameter.std().item())
    return made


def _train(model: MixtralForCausalLM, source: ModelSource, options: argparse.Namespace) -> list[float]:
    """Train routers, experts and norms; the losses of the steps."""
    count = options.steps * options.samples
    stream = token_stream(texts("wikitext2", "train"), source.tokenizer(), 2 * count * options.length)
    generator = torch.Generator().manual_seed(0)
    windows = draw_windows(stream, count, options.length, generator)
    windows = windows[torch.randperm(count, generator=generator)]
    model.requires_grad_(False).train()
    trained = [p for name, p in model.named_parameters() if ".mlp." in name or "norm" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adafactor(trained, lr=options.rate)
    losses: list[float] = []
    for step, batch in enumerate(windows.split(options.samples)):
        optimizer.param_groups[0]["lr"] = options.rate * min(1, (step + 1) / 10) * (1 - step / options.steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: {losses[-1]:.3f}", flush=True)
    model.eval()
    return losses


@torch.no_grad()
def _likeness(model: PreTrainedModel) -> float:
    """Mean cosine of two experts' first matrices, over all layers."""
    found = []
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            rows = torch.nn.functional.normalize(parameter.flatten(1), dim=1)
            others = rows @ rows.T
            found.append((others.sum() - others.trace()) / (others.numel() - len(rows)))
    return torch.stack(found).mean().item()


@torch.no_grad()
def _load(model: MixtralForCausalLM, tokens: torch.Tensor) -> list[list[float]]:
    """Share of the tokens' choices that each expert of each layer gets."""
    shares = []
    for logits in model(tokens[:1], output_router_logits=True).router_logits:
        chosen = logits.topk(2, dim=-1).indices.flatten()
        counts = chosen.bincount(minlength=logits.shape[-1])
        shares.append([round(count / len(chosen), 4) for count in counts.tolist()])
    return shares


if __name__ == "__main__":
    main()
