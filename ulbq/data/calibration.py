"""Calibration samples: windows of tokens drawn with a seed, hashed, stored.

The protocol of GPTQ and its successors, with one change: texts are joined with blank lines and tokenised without
special tokens, and ``samples`` windows of ``length`` tokens are drawn at random. The change is that windows do not
overlap where the text is long enough, so that no token is seen twice in a pass and a sample that is held out of the
training is truly unseen.

Where the tokenizer itself puts a beginning-of-text token before every text, each window starts with it: that is
what the model sees at inference, and models such as Gemma are out of their depth without.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from ulbq import distributed, limits
from ulbq.artifacts.disk import write_atomically, writing
from ulbq.blockwise.samples import Samples
from ulbq.data import registry
from ulbq.data.contents import Contents, contents
from ulbq.data.files import TEXT_SUFFIXES, read_text_file, require_file, suffix_of
from ulbq.data.image_rows import names_images
from ulbq.data.prompts import ChatWriter
from ulbq.data.windows import draw_windows, leading_tokens, token_stream
from ulbq.errors import InputError, ResourceError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ulbq.data.images import ImageSample

CALIBRATION_FILE = "calibration.safetensors"
"""Where an artifact holds its samples."""
TEXT_FILE = "end-to-end.safetensors"
"""Where it holds those of an end-to-end phase that had its own."""

MIX = ("wikitext2", "c4", "alpaca")
"""The sets that ``mix`` draws equal shares from: an encyclopaedia, the web, instructions."""

_MOST_READ = 1 << 23  # tokens read of one text, about 32 MB: more would cost minutes and change nothing
_READ_AHEAD = 4  # of an endless set, tokens read for every token used
_WEIGHT = re.compile(r":(\d+(?:\.\d+)?)$")
_ORIGIN = "calibration"  # the key of a file's metadata


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token samples and where they come from.

    Attributes:
        name: the data set, the file's name, ``mix`` or ``self``.
        tokens: int64 ``[samples, length]``, on the CPU.
        seed: what the windows, the examples or the model's own words were drawn with.
        mask: bool ``[samples, length]``, the tokens that are to be learnt; None for all.
        images: what each sample shows; None for text.
        contents: what the samples hold; None where nobody looked.
    """

    name: str
    tokens: torch.Tensor
    seed: int
    mask: torch.Tensor | None = None
    images: "tuple[ImageSample, ...] | None" = None
    contents: Contents | None = None

    @property
    def drawn(self) -> Samples:
        """The samples as a model takes them."""
        return Samples(self.tokens, self.images)

    @cached_property
    def sha256(self) -> str:
        """Hash of the shape, the tokens as little-endian int32, which are learnt as bytes, and what images show."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.numpy().astype("<i4").tobytes())
        if self.mask is not None:
            digest.update(self.mask.numpy().tobytes())
        for sample in self.images or ():
            digest.update(f"{sample.settings} {' '.join(sample.sha256)}\n".encode())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """What a manifest notes: name, samples, sequence_length, seed, sha256; tokens learnt; images; contents."""
        samples, length = self.tokens.shape
        learnt = {} if self.mask is None else {"taught_tokens": int(self.mask.sum())}
        images = {} if self.images is None else {"images": sum(len(sample.sha256) for sample in self.images)}
        return {
            "name": self.name,
            "samples": samples,
            "sequence_length": length,
            **learnt,
            **images,
            "seed": self.seed,
            "sha256": self.sha256,
            **({} if self.contents is None else {"contents": self.contents.record()}),
        }


def calibration_samples(
    spec: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    length: int,
    seed: int = 0,
    data_dir: Path | None = None,
    offline: bool = False,
) -> Calibration:
    """Draw calibration samples from named sets and files.

    Args:
        spec: a name in :data:`ulbq.data.registry.TEXT_SETS`; ``mix``; a ``.txt``, ``.jsonl`` or ``.parquet``
            file, whose chats are written by the tokenizer's template; several of these, with weights; or a
            ``.safetensors`` file of tokens, whose first ``samples`` rows are taken and cut to ``length`` (a flat
            tensor is drawn from like text). What the model writes itself comes from
            :func:`ulbq.data.generate.self_samples`.
        tokenizer: the model's.
        samples: number of windows.
        length: tokens a window, a beginning-of-text token included.
        seed: of the draw; torch's global generator is neither read nor moved.
        data_dir: mirror folder, see :func:`ulbq.data.mirror.data_root`.
        offline: never touch the network.

    Raises:
        UsageError: neither a set nor a file; fewer than one sample of two tokens.
        InputError: unreadable data, too little of it, or tokens outside the vocabulary.
        ResourceError: the set cannot be had here.
    """
    if samples < 1 or length < 2:
        raise UsageError(
            "Calibration needs at least one sample of two tokens.", hint="See `samples`, `sequence_length`."
        )
    generator = torch.Generator().manual_seed(seed)
    shares = _shares(spec, samples)
    if suffix_of(path := Path(next(iter(shares)))) == ".safetensors":
        return _stored_samples(path, len(tokenizer), samples, length, generator, seed)
    leading = torch.tensor(leading_tokens(tokenizer), dtype=torch.int64)
    chats, of_chats, drawn = ChatWriter(tokenizer), 0.0, []
    for name, share in shares.items():
        before, read = chats.written, count()
        texts, limit = _source(name, share * length, data_dir, offline, chats)
        texts = (text for text, _ in zip(texts, read, strict=False))
        stream = token_stream(texts, tokenizer, limit)
        windows = draw_windows(stream, share, length - len(leading), generator, name)
        drawn.append(torch.cat([leading.expand(share, -1), windows], dim=1))
        of_chats += share / samples * (chats.written - before) / next(read)
    # In a random order, so that any slice of the samples is a fair one.
    order = torch.randperm(samples, generator=generator)
    tokens = torch.cat(drawn)[order]
    return Calibration(_name(spec), tokens, seed, contents=contents(tokens, tokenizer, of_chats))


def sources(spec: str) -> dict[str, float]:
    """What samples are drawn from, each with its weight: the parts of ``a.jsonl:2,wikitext2:1``.

    A weight that nobody gives is 1. What is the path of a file is that file, whatever stands in it.

    Raises:
        UsageError: a source that is named twice, or cannot stand beside others.
    """
    if spec == "mix":
        return dict.fromkeys(MIX, 1.0)
    if os.path.exists(spec) or ("," not in spec and not _WEIGHT.search(spec)):
        return {spec: 1.0}
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    found: dict[str, float] = {}
    for part in parts:
        weight = _WEIGHT.search(part)
        name = part[: weight.start()] if weight else part
        if name in found:
            raise UsageError(f"`calibration` names '{name}' twice.", hint="Give it one weight.")
        found[name] = float(weight[1]) if weight else 1.0
    if not found:
        raise UsageError("`calibration` names no source.", hint="As in 'wikitext2', or 'a.jsonl:2,wikitext2:1'.")
    alone = next((name for name in found if _stands_alone(name)), None)
    if alone is not None:
        raise UsageError(f"'{alone}' stands alone in `calibration`.", hint="Sets and files of text have weights.")
    if not all(0 < weight <= limits.OPTION for weight in found.values()):
        raise UsageError(
            f"A weight in `calibration` is 0, or above {limits.OPTION:g}.",
            hint="Leave that source out, or weigh it less.",
        )
    return found


def _stands_alone(name: str) -> bool:
    return name in ("mix", "self") or suffix_of(Path(name)) == ".safetensors" or names_images(Path(name))


def _name(spec: str) -> str:
    """What samples are called: files without their folders, weights where there are several sources."""
    named = sources(spec)
    if spec == "mix" or len(named) == 1:
        return Path(spec if spec == "mix" else next(iter(named))).name
    return ",".join(f"{Path(name).name}:{weight:g}" for name, weight in named.items())


def check_calibration(spec: str, *, data_dir: Path | None = None, offline: bool = False) -> None:
    """Refuse what :func:`calibration_samples` could not draw from, without reading it; ``self`` passes.

    Raises:
        UsageError: neither a set nor a file.
        InputError: no such file or data folder.
        ResourceError: the set cannot be had here, and the network is off.
    """
    if spec == "self":
        return
    for name in sources(spec):
        if name in registry.TEXT_SETS:
            registry.check_at_hand(name, data_dir=data_dir, offline=offline)
        elif suffix_of(Path(name)) in (*TEXT_SUFFIXES, ".safetensors"):
            require_file(Path(name))
        else:
            raise _neither(name)


def _shares(spec: str, samples: int) -> dict[str, int]:
    """Samples to draw from each source: by weight, what does not divide goes to the largest remainders."""
    weights = sources(spec)
    exact = {name: samples * weight / sum(weights.values()) for name, weight in weights.items()}
    whole = {name: int(share) for name, share in exact.items()}
    first = sorted(exact, key=lambda name: whole[name] - exact[name])[: samples - sum(whole.values())]
    shares = {name: share + (name in first) for name, share in whole.items()}
    empty = next((name for name, share in shares.items() if not share), None)
    if empty is not None and spec != "mix":
        raise UsageError(
            f"Of {samples} samples none is left for '{empty}'.", hint="Raise `samples`, or its weight in `calibration`."
        )
    return {name: share for name, share in shares.items() if share}


def _source(
    name: str, needed: int, data_dir: Path | None, offline: bool, chats: ChatWriter
) -> tuple[Iterator[str], int]:
    """Texts of a set or file, and how many of their tokens to read."""
    ahead = _READ_AHEAD * needed
    if name in registry.TEXT_SETS:
        limit = ahead if registry.TEXT_SETS[name].endless else max(_MOST_READ, ahead)
        try:
            return registry.texts(name, "train", data_dir=data_dir, offline=offline), limit
        except ResourceError as error:
            hint = "Give a mirror with `data_dir` or ULBQ_DATA_DIR, a text file, or `calibration=self`."
            raise ResourceError(error.message, hint=hint) from error
    path = Path(name)
    if suffix_of(path) in TEXT_SUFFIXES:
        return read_text_file(path, chats), max(_MOST_READ, ahead)
    raise _neither(name)


def _neither(name: str) -> UsageError:
    return UsageError(
        f"'{name}' is neither a calibration set nor a data file.",
        hint=f"Sets: {', '.join([*registry.TEXT_SETS, 'mix', 'self'])}. Files: .txt, .jsonl, .parquet, .safetensors. "
        "Several: a.jsonl:2,wikitext2:1.",
    )


def _stored_samples(
    path: Path, vocabulary: int, samples: int, length: int, generator: torch.Generator, seed: int
) -> Calibration:
    loaded = load_calibration(path)
    tokens, mask = loaded.tokens, loaded.mask
    outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if outside.numel():
        raise InputError(
            f"{path} holds token {int(outside[0])}, outside the vocabulary of {vocabulary:,}.",
            hint="The file was written with another model's tokenizer.",
        )
    rows, columns = tokens.shape
    if rows == 1 and samples > 1 and mask is None:
        return Calibration(path.name, draw_windows(tokens[0], samples, length, generator, str(path)), seed)
    if rows < samples or columns < length:
        raise InputError(
            f"{path} holds {rows} samples of {columns} tokens, not {samples} of {length}.",
            hint=f"Pass `samples={min(samples, rows)}` `sequence_length={min(length, columns)}`.",
        )
    cut = None if mask is None else mask[:samples, :length].contiguous()
    if cut is not None and not cut[:, 1:].any(1).all():
        raise InputError(
            f"{path} holds samples whose answers begin behind {length} tokens.",
            hint=f"Pass `sequence_length={columns}`.",
        )
    return Calibration(path.name, tokens[:samples, :length].contiguous(), seed, cut)


def save_calibration(path: Path, calibration: Calibration) -> None:
    """Write samples as safetensors, whole or not at all.

    The file holds ``tokens``, int32 ``[samples, length]``, and ``taught`` bool where not all are to be learnt, with
    name, seed and hash as metadata. Of images it holds the SHA-256 of each file, by sample.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    # One metadata entry: safetensors writes several in an order that changes from file to file.
    origin: dict[str, Any] = {"name": calibration.name, "seed": calibration.seed, "sha256": calibration.sha256}
    if calibration.images is not None:
        origin["images"] = [sample.sha256 for sample in calibration.images]
    tensors = {"tokens": calibration.tokens.to(torch.int32)}
    if calibration.mask is not None:
        tensors["taught"] = calibration.mask
    data = safetensors.torch.save(tensors, {_ORIGIN: json.dumps(origin)})
    with writing(path):
        distributed.on_main(write_atomically, path, data)


def load_calibration(path: Path) -> Calibration:
    """Read what :func:`save_calibration` wrote, or any safetensors file with integer ``tokens``.

    A flat ``[n]`` tensor counts as one long sample. ``taught`` is read where it is there.

    Raises:
        InputError: no such file, not safetensors, no integer ``tokens``, not the tokens that were saved, or samples of
            images.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            origin = json.loads((file.metadata() or {}).get(_ORIGIN, "{}"))
            names = set(file.keys())
            tokens = file.get_tensor("tokens") if "tokens" in names else torch.empty(0)
            mask = file.get_tensor("taught") if "taught" in names else None
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.", hint="Check the path.") from error
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}).", hint="Write it again.") from error
    if tokens.is_floating_point() or tokens.dim() not in (1, 2) or not tokens.numel():
        raise InputError(f"{path} holds no samples.", hint="It needs an integer tensor 'tokens' [samples, length].")
    if not isinstance(origin, dict):
        origin = {}  # another tool's note
    if "images" in origin:
        raise InputError(
            f"The samples in {path} show images, of which the file holds the hashes alone.",
            hint="Give the file that names the images.",
        )
    tokens = tokens.to(torch.int64).reshape(-1, tokens.shape[-1])
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens.shape):
        raise InputError(f"'taught' in {path} does not fit its tokens.", hint="It needs booleans [samples, length].")
    loaded = Calibration(origin.get("name", path.name), tokens, origin.get("seed", 0), mask)
    if origin.get("sha256", loaded.sha256) != loaded.sha256:
        raise InputError(f"The tokens in {path} are not those that were saved.", hint="The file is damaged.")
    return loaded
