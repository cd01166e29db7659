"""How a model is loaded, for its card: by which command, on which hardware, at how many bits."""

from collections.abc import Iterable
from typing import NamedTuple

from ulbq.config.convert import ENGINES
from ulbq.export.engines import services
from ulbq.export.fit import Candidate
from ulbq.export.markdown import code, plain
from ulbq.export.rules import Reader
from ulbq.export.targets import target as target_of
from ulbq.export.targets.base import Target
from ulbq.models.skeleton import auto_class

_MERGED = "Convert it with `ulbq convert DIR --for NAME --merge-adapter`."
# By whether the layout itself is dense.
_UNPACKED = (
    "Not packed: convert it with `ulbq convert DIR --for NAME --dtype fp16`.",
    "Not packed: convert it with `ulbq convert DIR --for NAME --to dense`.",
)
_HEAD = ("| engine | command | hardware | bits a weight |", "| --- | --- | --- | --- |")


class _Row(NamedTuple):
    """Of an engine: ``folder`` is what its command loads, ``more`` is said after what it needs."""

    engine: str
    reader: Reader
    bits: str
    folder: str = "DIR"
    more: str = ""


def of_artifact(candidate: Candidate) -> list[str]:
    """Paragraphs for an artifact of ulbq's own."""
    opener = code(f"{auto_class(candidate.config).__name__}.from_pretrained(DIR)")
    attached = ", adapter attached" if candidate.adapter else ""
    paragraphs = [
        "**ulbq**: `ulbq generate DIR` hears it, `ulbq eval DIR` scores it, `ulbq inspect DIR` looks into it.",
        f"**transformers**: with ulbq installed, {opener} loads it packed{attached}.",
    ]
    served = target_of("half").readers["vllm-cpu"]
    if served.obstacle(candidate, ENGINES["vllm-cpu"]) is None:
        tuned = (
            ". For the adapter vLLM takes `--enable-lora --lora-modules tuned=DIR/adapter`" if candidate.adapter else ""
        )
        paragraphs.append(
            f"**vLLM**: with the plug-in ulbq-vllm, {code(served.start(candidate))} loads it packed on a CPU; on a GPU "
            f"that was not run{tuned}."
        )
    able, unable = services(candidate)
    rows = [
        _Row(
            f"{ENGINES[engine]} ({code(engine)})",
            one.reader,
            ("at most " if one.at_most else "") + _number(one.bits),
            "OUT",
            _MERGED if one.merged else _UNPACKED[one.target == "dense"] if one.bits == 16 else "",
        )
        for engine, one in able.items()
    ]
    if rows:
        beside = ", without the adapter; the card in OUT says how to load that" if candidate.adapter else ""
        paragraphs += [
            "**Engines** load what `ulbq convert DIR --for NAME -o OUT` writes, with the NAME in brackets. "
            f"Bits are those of the quantized layers{beside}.",
            _table(candidate, rows),
        ]
    if unable:
        paragraphs.append(f"**Not for** {_reasons(unable)}.")
    if target_of("dense").unsupported_reason(candidate) is None:
        made = (
            "`ulbq convert DIR --to dense --merge-adapter` writes"
            if candidate.adapter
            else "`ulbq convert DIR --to dense` writes"
        )
        paragraphs.append(f"**Everything else**: {made} a plain half-precision model.")
    return paragraphs


def of_converted(candidate: Candidate, target: Target, bits: float, *, merged: bool) -> list[str]:
    """Paragraphs for what was converted to a target, whose packed weights take so many ``bits`` now."""
    able = {
        engine: _Row(ENGINES[engine], reader, _number(bits))
        for engine, reader in target.readers.items()
        if reader.obstacle(candidate, ENGINES[engine]) is None
    }
    paragraphs = [_table(candidate, able.values())] if able else []
    if candidate.adapter and not merged:
        ways = "; ".join(way for engine, way in target.adapter_commands.items() if engine in able)
        alone = "Without it the weights are those of the quantized model alone."
        paragraphs.append(f"**The adapter**: {ways or 'no engine is known to take it beside these weights'}. {alone}")
    return paragraphs


def _table(candidate: Candidate, rows: Iterable[_Row]) -> str:
    lines = []
    for row in rows:
        command = code(row.reader.start(candidate).replace("DIR", row.folder))
        told = " ".join(text for text in (row.reader.needs, row.more) if text)
        cells = (row.engine, f"{command}. {told}" if told else command, row.reader.hardware, row.bits)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join((*_HEAD, *lines))


def _number(bits: float) -> str:
    """Two digits behind the point, as far as they say something: ``2.25``, ``4.5``, ``16``."""
    return f"{bits:.2f}".rstrip("0").rstrip(".")


def _reasons(unable: dict[str, str]) -> str:
    """Engines and why, those with the same reason together."""
    engines: dict[str, list[str]] = {}
    for engine, reason in unable.items():
        engines.setdefault(reason, []).append(ENGINES[engine])
    return "; ".join(f"{', '.join(names)}: {plain(reason)}" for reason, names in engines.items())
