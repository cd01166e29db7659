"""What a fine-tuning run learns from: questions whose answers are learnt, or blocks of plain text.

Nothing is packed or filled up here: each example is as long as it is. Some are held out, drawn first, so that they stay
the same ones however many train.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from ulbq.artifacts.names import local_path
from ulbq.config.run import Template
from ulbq.data import registry
from ulbq.data.calibration import Calibration, calibration_samples
from ulbq.data.files import TEXT_SUFFIXES, read_text_file, suffix_of
from ulbq.data.instructions import Chat, data_file, encode, read_chats
from ulbq.data.mirror import data_root, mirror_file
from ulbq.data.prompts import choose_template
from ulbq.data.windows import leading_tokens, token_stream
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_READ = 1 << 23  # tokens of plain text; what fine-tuning takes more of is a pre-training


class Example(NamedTuple):
    """Tokens, and which of them are learnt; the first one never counts, since nothing stands before it."""

    tokens: list[int]
    mask: list[bool]


@dataclass(frozen=True, eq=False)
class ExampleSet:
    """What trains, and what is held out.

    Attributes:
        sources: the sets or files that were read.
        template: how questions are laid out; None for plain text.
        train: in the order of the draw.
        validation: never trained on.
        seed: of the draw.
    """

    sources: tuple[str, ...]
    template: Template | None
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    seed: int

    @cached_property
    def sha256(self) -> str:
        """Hash of all tokens and of which are learnt, those held out last."""
        digest = hashlib.sha256(f"{len(self.train)} {len(self.validation)}".encode())
        for example in (*self.train, *self.validation):
            digest.update(f" {len(example.tokens)} ".encode())
            digest.update(numpy.array(example.tokens, "<i4").tobytes())
            digest.update(bytes(example.mask))
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """What a manifest notes: sources, samples, heldout, tokens and taught_tokens of what trains, seed, sha256."""
        return {
            "sources": list(self.sources),
            "samples": len(self.train),
            "heldout": len(self.validation),
            "tokens": sum(len(example.tokens) for example in self.train),
            "taught_tokens": sum(sum(example.mask[1:]) for example in self.train),
            "seed": self.seed,
            "sha256": self.sha256,
        }


def training_text(
    spec: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    length: int,
    seed: int,
    template: Template | None,
    data_dir: Path | None,
    offline: bool,
    progress: Progress,
) -> Calibration:
    """Draw samples of plain text or of an instruction set.

    Args:
        spec: what :func:`~ulbq.data.calibration.calibration_samples` takes; or a file of rows, a folder with a
            ``train`` file of rows, ``alpaca``, or the Hub id of a set (``llm-adapters/math``), whose ``train`` split
            is taken. A file of rows is plain text where its first row has none of an instruction set's layouts.
        tokenizer: the model's.
        samples: how many.
        length: tokens a sample; longer answers are cut.
        seed: of the draw.
        template: how instructions are laid out; None for the tokenizer's chat template where there is one, else
            Alpaca's prompt.
        data_dir: mirror folder, see :func:`ulbq.data.mirror.data_root`.
        offline: never touch the network.
        progress: told what was left out.

    Returns:
        The samples; of an instruction set with a mask, padded behind their ends.

    Raises:
        UsageError: no such set or file; a template for plain text, or one that the tokenizer does not have.
        InputError: unreadable data, too little of it; a row in no layout, named by its line.
        ResourceError: the set cannot be had here.
    """
    chats = read_chats(spec, data_dir=data_dir, offline=offline, progress=progress)
    if chats is None:
        if template is not None:
            raise UsageError(
                f"`template={template}` means nothing to '{spec}', which is plain text.", hint="Leave it out."
            )
        file = data_file(spec, data_dir)
        return calibration_samples(
            spec if file is None else str(file),
            tokenizer,
            samples=samples,
            length=length,
            seed=seed,
            data_dir=data_dir,
            offline=offline,
        )
    chosen = choose_template(template, tokenizer)
    drawn = _draw(spec, chats, tokenizer, chosen, samples, 0, length, seed, progress)
    tokens = torch.full((len(drawn), length), padding(tokenizer), dtype=torch.int64)
    mask = torch.zeros((len(drawn), length), dtype=torch.bool)
    for row, example in enumerate(drawn):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        mask[row, : len(example.tokens)] = torch.tensor(example.mask)
    return Calibration(Path(spec).name, tokens, seed, mask)


def padding(tokenizer: "PreTrainedTokenizerBase") -> int:
    """A token for behind an example's end, where nobody looks."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


def draw_examples(
    specs: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: Template | None,
    samples: int | None,
    heldout: int,
    length: int,
    seed: int,
    data_dir: Path | None,
    offline: bool,
    progress: Progress,
) -> ExampleSet:
    """Draw what trains and what is held out.

    Args:
        specs: instruction sets as :func:`~ulbq.data.instructions.training_text` takes them, their rows mixed; or one
            plain text: a name in :data:`~ulbq.data.registry.TEXT_SETS` or a file. Of several sets those count that the
            mirror has, and ``progress`` is warned of the others.
        tokenizer: the model's.
        template: how questions are laid out; None for the chat template where there is one, else Alpaca's prompt.
        samples: how many train; None for all.
        heldout: how many are held out; of a named text with a validation split, they are from there.
        length: tokens an example at most; longer answers are cut.
        seed: of the draw.
        data_dir: mirror folder, see :func:`ulbq.data.mirror.data_root`.
        offline: never touch the network.
        progress: told what was left out.

    Raises:
        UsageError: no such set; a template for plain text, or one that the tokenizer does not have.
        InputError: unreadable data, too little of it; a row in no layout, named by its line.
        ResourceError: a set cannot be had here.
    """
    specs = _at_hand(specs, data_dir, progress)
    read = [read_chats(spec, data_dir=data_dir, offline=offline, progress=progress) for spec in specs]
    known = [chats for chats in read if chats is not None]
    if not known and len(specs) == 1:
        if template is not None:
            raise UsageError(
                f"`template={template}` means nothing to '{specs[0]}', which is plain text.", hint="Leave it out."
            )
        return _blocks(specs[0], tokenizer, samples, heldout, length, seed, data_dir, offline)
    if len(known) < len(read):
        raise UsageError(f"Plain text cannot be mixed with instructions: {', '.join(specs)}.", hint="Take one of them.")
    chosen = choose_template(template, tokenizer)
    chats = [chat for some in known for chat in some]
    found = _draw(", ".join(specs), chats, tokenizer, chosen, samples, heldout, length, seed, progress)
    return ExampleSet(tuple(specs), chosen, found[heldout:], found[:heldout], seed)


def _at_hand(specs: Sequence[str], data_dir: Path | None, progress: Progress) -> Sequence[str]:
    """Of several sets, those that are there."""
    if len(specs) == 1:
        return specs
    root = data_root(data_dir)
    found = [spec for spec in specs if mirror_file(root, spec, None, "train") is not None]
    missing = [spec for spec in specs if spec not in found]
    if not found:
        raise ResourceError(
            f"None of {', '.join(specs)} has a train split in the mirror ({root or 'none given'}).",
            hint="Give a mirror with `data_dir` or ULBQ_DATA_DIR, or a file with `data`.",
        )
    if missing:
        progress.warn(f"Not at hand, and left out: {', '.join(missing)}. Training on {', '.join(found)}.")
    return found


def _draw(
    spec: str,
    chats: Sequence[Chat],
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    samples: int | None,
    heldout: int,
    length: int,
    seed: int,
    progress: Progress,
) -> tuple[Example, ...]:
    """Examples in a random order; examples whose answer begins behind ``length`` tokens are passed over."""
    wanted = None if samples is None else samples + heldout
    order = torch.randperm(len(chats), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn: list[Example] = []
    cut = without = 0
    for index in order:
        tokens, mask = encode(chats[index], tokenizer, template)
        if not any(mask[1:length]):
            without += 1
            continue
        cut += len(tokens) > length
        drawn.append(Example(tokens[:length], mask[:length]))
        if len(drawn) == wanted:
            break
    least = heldout + 1 if wanted is None else wanted
    if len(drawn) < least:
        left_out = f"; {without} more have their answer behind {length} tokens" if without else ""
        raise InputError(
            f"'{spec}' holds {len(drawn)} examples, not {least}{left_out}.",
            hint=(
                f"Of those asked for, {heldout} are held out. Ask for fewer with `samples` and `validation_samples`"
                if heldout
                else "Ask for fewer samples, or give more examples"
            )
            + (", or a greater `sequence_length`." if without else "."),
        )
    if cut or without:
        progress.note(
            f"Of '{spec}', {cut} of {len(drawn)} examples are cut at {length} tokens"
            + (f", and {without} were passed over because their answer begins later." if without else ".")
        )
    return tuple(drawn)


def _blocks(
    spec: str,
    tokenizer: "PreTrainedTokenizerBase",
    samples: int | None,
    heldout: int,
    length: int,
    seed: int,
    data_dir: Path | None,
    offline: bool,
) -> ExampleSet:
    """Plain text, joined and cut into blocks of equal length; what is left over at the end is dropped."""
    named = registry.TEXT_SETS.get(spec)
    apart = named is not None and "validation" in named.splits
    limit = _MOST_READ if samples is None else min(_MOST_READ, (samples + heldout) * length * 4)
    if named is not None:
        texts = registry.texts(spec, "train", data_dir=data_dir, offline=offline)
    elif suffix_of(Path(spec)) in TEXT_SUFFIXES:
        texts = read_text_file(local_path(spec))
    else:
        raise UsageError(
            f"'{spec}' is neither a text, nor an instruction set, nor a data file.",
            hint=f"Texts: {', '.join(registry.TEXT_SETS)}. Files: {', '.join(TEXT_SUFFIXES)}.",
        )
    found = _cut(token_stream(texts, tokenizer, limit), tokenizer, length)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    found = [found[index] for index in order]
    if apart and heldout:
        others = registry.texts(spec, "validation", data_dir=data_dir, offline=offline)
        held, train = _cut(token_stream(others, tokenizer, heldout * length), tokenizer, length), found
    else:
        held, train = found[:heldout], found[heldout:]
    least = 1 if samples is None else samples
    if len(train) < least or len(held) < heldout:
        raise InputError(
            f"'{spec}' holds {len(train)} blocks of {length} tokens to train on and {len(held)} to hold out, "
            f"not {least} and {heldout}.",
            hint="Ask for fewer with `samples` and `validation_samples`, or for a smaller `sequence_length`.",
        )
    return ExampleSet((spec,), None, tuple(train[:samples]), tuple(held), seed)


def _cut(stream: torch.Tensor, tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Example]:
    leading = leading_tokens(tokenizer)
    own = length - len(leading)
    tokens = stream.tolist()
    starts = range(0, len(tokens) - own + 1, own)
    return [Example([*leading, *tokens[start : start + own]], [True] * length) for start in starts]
