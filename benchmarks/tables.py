"""Write the figures of `benchmarks/results/quality-*.json` into README and docs, and draw them.

    python benchmarks/tables.py

A page says where a figure comes from, in a comment before it: ``<!-- gptq-w2 -->109.0`` is a setting's perplexity,
``<!-- gptq-w2 bits -->2.28`` its true bits, ``<!-- apiq-r16 base -->82.51`` the perplexity without the adapter, and
``<!-- eqat-w2-s0 eqat-w2-s1 eqat-w2-s2 mean -->73.5 ± 3.8`` mean and standard deviation of several; the settings of
``k-quants-cpu.json``, which ``k_quants.py`` writes, are among them. The page ``docs/perplexity.md`` has every row of
ours and of other programs (``quality-peers-cpu.json``), and the drawing; ``docs/guides/experts.md`` those of
``upcycle-cpu.json``, which ``mixture.py`` writes; ``docs/guides/running.md`` those of ``decode-cpu.json``, which
``decode.py`` writes; ``docs/guides/converting.md`` those of ``export-cpu.json``, which ``export.py`` writes;
``docs/guides/vllm.md`` those of ``vllm-cpu.json``, which ``vllm_cpu.py`` writes; ``docs/gpu.md`` those of every
``gpu-*.json``, which ``gpu.py`` writes; ``<!-- sweep NAME -->`` on any page is the table of
``swept-NAME-cpu.json``, which ``swept.py`` writes.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from markupsafe import Markup
from quality import SETTINGS

from ulbq.evaluation.svg import Drawing, Scale, element, number

ROOT = Path(__file__).resolve().parents[1]
PAGE, DRAWING = ROOT / "docs" / "perplexity.md", ROOT / "docs" / "perplexity.svg"
PEERS = "quality-peers-cpu.json"
MIXTURE_PAGE, MIXTURE = ROOT / "docs" / "guides" / "experts.md", ROOT / "benchmarks" / "results" / "upcycle-cpu.json"
DECODE_PAGE, DECODE = ROOT / "docs" / "guides" / "running.md", ROOT / "benchmarks" / "results" / "decode-cpu.json"
ENGINES_PAGE, ENGINES = ROOT / "docs" / "guides" / "converting.md", ROOT / "benchmarks" / "results" / "export-cpu.json"
K_QUANTS = ROOT / "benchmarks" / "results" / "k-quants-cpu.json"
VLLM_PAGE, VLLM = ROOT / "docs" / "guides" / "vllm.md", ROOT / "benchmarks" / "results" / "vllm-cpu.json"
GPU_PAGE = ROOT / "docs" / "gpu.md"
GPU_PARTS = ("tests", "kernels", "training", "methods", "resume", "decoding", "large")
FULL, MOST, WIDEST = 24.19, 1200.0, 5.5
"""The model in full precision; what the drawing has room for, perplexity and bits."""

_FIGURE = re.compile(
    r"<!-- ([\w. -]+?)( bits| base| mean)? -->(\d{1,3}(?:,\d{3})*(?:\.\d+)?(?: ± [\d.]+)?(?: million)?)"
)
_TABLE = re.compile(r"(<!-- every row -->\n).*(<!-- end -->)", re.DOTALL)
_MIXTURE = re.compile(r"(<!-- mixture -->\n).*(<!-- end -->)", re.DOTALL)
_DECODE = re.compile(r"(<!-- decode ([\w]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ENGINES = re.compile(r"(<!-- engines -->\n).*(<!-- end -->)", re.DOTALL)
_VLLM = re.compile(r"(<!-- vllm -->\n).*(<!-- end -->)", re.DOTALL)
_GPU = re.compile(r"(<!-- gpu -->\n).*(<!-- end -->)", re.DOTALL)
_SWEPT = re.compile(r"(<!-- sweep ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_COLOURS = ("#2f6bd8", "#d9730d", "#12907d", "#b1458f", "#7b5bd6", "#a3851c", "#c2410c", "#4d7c0f", "#0e7490")
_STYLE = """
svg { background: #fff; font: 13px system-ui, sans-serif; }
text { fill: #171b22; } .soft { fill: #5c6675; } .grid { stroke: #e4e7ec; }
.full { stroke: #5c6675; stroke-dasharray: 5 4; }
.curve { fill: none; stroke-width: 2; } .peer { fill: #fff; stroke: #5c6675; stroke-width: 1.5; }
"""

Row = dict[str, Any]


def rows() -> dict[str, Row]:
    """Every measured row by its setting; those of other programs name a ``program`` in place of ``options``."""
    files = sorted((ROOT / "benchmarks" / "results").glob("quality-*.json"))
    found = {row["setting"]: row for file in files for row in json.loads(file.read_text(encoding="utf-8"))}
    return {name: row | _made(row) for name, row in found.items()}


def _made(row: Row) -> Row:
    """The method and the options that a row does not tell in the same words for all."""
    if "program" in row:
        return {"method": row["program"]}
    setting = SETTINGS[row["setting"]]
    text = " ".join(setting.options)
    short = re.sub(r"--calibration wikitext2 ?|--sequence-length 512 ?|--samples 32 ?", "", text)
    begun = f", from `{setting.start}`" if setting.start else ""
    return {"method": setting.options[1], "options": f"`{short.strip()}`{begun}"}


def pages() -> Iterator[tuple[Path, str]]:
    """Every page with figures, and the drawing, as they have to be."""
    found = rows()
    figures = dict(found)
    if K_QUANTS.is_file():
        figures |= {row["setting"]: row for row in json.loads(K_QUANTS.read_text(encoding="utf-8"))["rows"]}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if path == PAGE:
            text = _TABLE.sub(lambda match: match[1] + "\n".join(table(found)) + "\n" + match[2], text)
        if path == MIXTURE_PAGE and MIXTURE.is_file():
            lines = "\n".join(mixture(json.loads(MIXTURE.read_text(encoding="utf-8"))))
            text = _MIXTURE.sub(rf"\g<1>{lines}\n\g<2>", text)
        if path == DECODE_PAGE:
            text = _DECODE.sub(lambda match: match[1] + "\n".join(decode(match[2])) + "\n" + match[3], text)
        if path == ENGINES_PAGE:
            lines = "\n".join(engines(json.loads(ENGINES.read_text(encoding="utf-8"))["tiny"]))
            text = _ENGINES.sub(lambda match, lines=lines: f"{match[1]}{lines}\n{match[2]}", text)
        text = _SWEPT.sub(lambda match: match[1] + "\n".join(swept(match[2])) + "\n" + match[3], text)
        if path == VLLM_PAGE:
            lines = "\n".join(vllm(json.loads(VLLM.read_text(encoding="utf-8"))))
            text = _VLLM.sub(lambda match, lines=lines: f"{match[1]}{lines}\n{match[2]}", text)
        if path == GPU_PAGE:
            text = _GPU.sub(lambda match: match[1] + "\n".join(gpus()) + "\n" + match[2], text)
        yield path, _FIGURE.sub(lambda match: f"<!-- {match[1]}{match[2] or ''} -->{_figure(match, figures)}", text)
    yield DRAWING, drawing(list(found.values())) + "\n"


def table(found: dict[str, Row]) -> Iterator[str]:
    """Markdown: methods by name, then other programs, each by true bits."""
    yield from ("", "| setting | options | true bits | perplexity |", "| --- | --- | --- | --- |")
    for row in sorted(found.values(), key=lambda one: ("program" in one, one["method"], one["true_bits"])):
        name = row.get("program", f"`{row['setting']}`")
        yield f"| {name} | {row['options']} | {row['true_bits']:.2f} | {perplexity(row['perplexity'])} |"
    yield ""


def mixture(measured: Row) -> Iterator[str]:
    """Markdown: how the mixture trained, its rows beside the dense model's, and experts that no token reached."""
    training, found = measured["training"], measured["rows"]
    yield (
        f"\n{len(training['losses'])} steps in {training['seconds'] / 60:.0f} minutes: perplexity "
        f"{perplexity(training['before'])} before, {perplexity(training['after'])} after; mean cosine of two experts "
        f"{training['cosine before']:.3f} and {training['cosine after']:.3f}. Perplexity below: {measured['windows']} "
        "windows of 1,024 tokens; the ratio is to the same model in full precision; tokens are those of the "
        "calibration that an expert saw: least, median, most.\n"
    )
    yield from ("| setting | true bits | perplexity | ratio | share quantized | tokens |", "| --- " * 6 + "|")
    for name, row in found.items():
        if "perplexity" in row:
            whole = found["dense" if name.startswith("dense") else "full"]["perplexity"]
            bits, share = (f"{row['true_bits']:.2f}", f"{row['share']:.1%}") if "true_bits" in row else ("16", "")
            tokens = " / ".join(f"{row['tokens'][one]:,.0f}" for one in ("least", "median", "most") if "tokens" in row)
            ratio = row["perplexity"] / whole
            yield f"| `{name}` | {bits} | {perplexity(row['perplexity'])} | {ratio:.2f} | {share} | {tokens} |"
    yield from ("", "| three blocks | relative error of experts that no token reached | of the others |")
    yield "| --- " * 3 + "|"
    for name, row in found.items():
        if "unseen_error" in row:
            yield f"| `{name}` | {row['unseen_error']:.3f} | {row['other_error']:.3f} |"
    yield ""


def decode(shape: str) -> Iterator[str]:
    """Markdown: tokens per second of one thread and of two, beside what llama.cpp did in turns with each."""
    measured = json.loads(DECODE.read_text(encoding="utf-8"))["rows"]
    one, two = (measured.get(f"{shape}, {threads}", {}) for threads in (1, 2))
    names = list(dict.fromkeys([*one, *two]))
    yield "\n| | writing, 1 thread | 2 threads | second thread | reading 256, 1 thread | 2 threads | most memory |"
    yield "| --- " * 7 + "|"
    for name in names:
        rows = [found.get(name) for found in (one, two)]
        writing, reading = ([_beside(row, key) for row in rows] for key in ("decode", "prompt"))
        second = f"{rows[1]['decode'] / rows[0]['decode']:.2f}" if rows[0] and rows[1] else ""
        peak = max(row["peak"] for row in rows if row)
        yield f"| {name} | {writing[0]} | {writing[1]} | {second} | {reading[0]} | {reading[1]} | {peak:.0f} MB |"
    yield ""


def _beside(row: Row | None, key: str) -> str:
    """Tokens per second, and how many times llama.cpp's."""
    if row is None:
        return ""
    value = f"{row[key]:.1f}" if row[key] < 100 else f"{row[key]:.0f}"
    if f"llama.cpp {key}" not in row:
        return value
    return f"{value} ({row[key] / row[f'llama.cpp {key}']:.2f})"


def engines(measured: dict[str, Row]) -> Iterator[str]:
    """Markdown: a row an artifact, a column an engine, and the reasons of cells without a difference below."""
    about = ("format", "true_bits", "spread", "rounding", "tokens")
    titles = list(dict.fromkeys(name for row in measured.values() for name in row if name not in about))
    reasons: dict[str, str] = {}
    yield from (
        "",
        f"| artifact | bits | spread | bfloat16 | {' | '.join(titles)} |",
        "| --- " * (len(titles) + 4) + "|",
    )
    for name, row in measured.items():
        cells = [_difference(row.get(title, "not run here"), reasons) for title in titles]
        shown = [f"{row['true_bits']:.2f}", f"{row['spread']:.1f}", f"{row['rounding']:.2f}", *cells]
        yield f"| {name} | {' | '.join(shown)} |"
    yield ""
    yield from (f"- ({letter}) {reason}." for reason, letter in reasons.items())
    yield ""


def _difference(cell: float | str, reasons: dict[str, str]) -> str:
    """A cell of an engine; a letter where there is a reason, which joins the others."""
    if not isinstance(cell, str):
        return f"{cell:.0e}" if cell < 0.01 else f"{cell:.2f}"
    kind, _, reason = cell.partition(": ")
    if not reason:
        return "not run"
    # Of which layer, and how many bits: that differs from row to row.
    short = re.sub(r"^'[^']*' is \w+ \S+, and ", "", reason).partition(", at 16 bits")[0]
    letter = reasons.setdefault(short if kind == "refused" else f"it fails: {short}", chr(ord("a") + len(reasons)))
    return f"({letter})" if kind == "refused" else f"fails ({letter})"


def swept(name: str) -> Iterator[str]:
    """Markdown: a row a setting by true bits, means over the seeds with the least and the most; the front is bold."""
    found = json.loads((ROOT / "benchmarks" / "results" / f"swept-{name}-cpu.json").read_text(encoding="utf-8"))
    titles = list(found["better"])
    yield from ("", f"| setting | true bits | weights | {' | '.join(titles)} | time | memory |")
    yield "| --- " * (5 + len(titles)) + "|"
    for setting, row in sorted(found["settings"].items(), key=lambda item: item[1]["bits"]):
        cells = [_over_seeds(row["values"][title], bold=setting in found["front"][title]) for title in titles]
        taken = f"{mean(row['seconds']):.0f} s" if not row["resumed"] else ""
        size, memory = f"{row['size'] / 1e6:.0f} MB", f"{row['peak_memory'] / 1e9:.2f} GB"
        yield f"| `{setting}` | {row['bits']:.2f} | {size} | {' | '.join(cells)} | {taken} | {memory} |"
    yield ""


def _over_seeds(values: Sequence[float], *, bold: bool) -> str:
    shown = perplexity(mean(values))
    whole = f"**{shown}**" if bold else shown
    return whole if len(values) == 1 else f"{whole} ({perplexity(min(values))} to {perplexity(max(values))})"


def vllm(measured: Row) -> Iterator[str]:
    """Markdown: tokens per second by the clock, and how many times those of the dense model."""
    yield from ("", "| | one request | eight at once |", "| --- " * 3 + "|")
    names = {"plug-in": f"packed, {measured['true_bits']:.2f} bits", "dense": "dense, bfloat16"}
    for key, name in names.items():
        rates = {count: turn["wall_tokens_per_s"] for count, turn in measured[key].items()}
        cells = [
            f"{rate:.1f} ({rate / measured['dense'][count]['wall_tokens_per_s']:.2f})" for count, rate in rates.items()
        ]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def gpus() -> Iterator[str]:
    """Markdown: what every GPU was found to do, by parts; "not measured" where there is nothing."""
    files = sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))
    measured = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for one in measured or [{"device": "Any GPU", "parts": {}}]:
        yield from ("", f"## {one['device']}", "", "| part | |", "| --- | --- |")
        for part in GPU_PARTS:
            found = one["parts"].get(part)
            if found is None:
                yield f"| {part} | not measured |"
            elif "failed" in found:
                yield f"| {part} | not measured: {found['failed'].replace('|', '/')} |"
            else:
                yield from _gpu_part(part, found)
    yield ""


def _gpu_part(part: str, found: Row) -> Iterator[str]:
    if part == "tests":
        yield f"| tests | {found['summary']} |"
    elif part == "kernels":
        yield f"| kernels | a copy: {found['copy_gb_per_s']:,.0f} GB/s |"
        for row in found["rows"]:
            where = f"{row['shape']}, {row['scheme']}, {row['rows']} rows, {row['kernel']}"
            if "failed" in row:
                yield f"| {where} | not measured: {row['failed'].replace('|', '/')} |"
            else:
                taken = row["graph"] or row["eager"]
                yield f"| {where} | {taken:.1f} µs, {row['of_copy']:.0%} of a copy |"
    elif part == "training":
        for name, row in found["medians"].items():
            yield f"| training, {name} | {row['seconds_a_block']:.1f} s a block |"
    elif part == "resume":
        yield f"| resume | {len(found['different'])} of {found['blocks']} blocks are others after a kill |"
    else:
        for row in found["rows"]:
            facts = [f"{name.replace('_', ' ')} {value}" for name, value in row.items()]
            yield f"| {part} | {', '.join(facts)} |"


def drawing(found: Sequence[Row]) -> str:
    """Perplexity over true bits: a line through the best of each method, a ring for each row of another program."""
    shown = [row for row in found if row["perplexity"] <= MOST and row["true_bits"] <= WIDEST]
    methods = sorted({row["method"] for row in shown if "program" not in row})
    width, bottom = 520.0, 420.0
    picture = Drawing(width, bottom + 44 + 22 * -(-(len(methods) + 1) // 3), "Perplexity over true bits")
    across, up = Scale(1, WIDEST, (52, width - 14)), Scale(22, MOST, (bottom, 14), log=True, ticks=8)
    for tick in up.ticks:
        picture.line((52, up(tick)), (width - 14, up(tick)), "grid")
        picture.text(46, up(tick) + 4, number(tick), style="soft", anchor="end")
    for tick in across.ticks:
        picture.text(across(tick), bottom + 18, number(tick), style="soft", anchor="middle")
    picture.text(width - 14, bottom + 34, "true bits a weight", style="soft", anchor="end")
    picture.line((52, up(FULL)), (width - 14, up(FULL)), "full")
    for row in shown:
        if "program" in row:
            hint = f"{row['program']}, {row['options']}: {perplexity(row['perplexity'])} at {row['true_bits']:.2f}"
            picture.dot(across(row["true_bits"]), up(row["perplexity"]), "peer", hint=hint)
    for place, name in enumerate([*methods, "other programs"]):
        x, y = 56 + 160.0 * (place % 3), bottom + 58 + 22 * (place // 3)
        picture.dot(x, y - 4, "peer" if name == "other programs" else f"m{place}")
        picture.text(x + 12, y, name)
    for place, name in enumerate(methods):
        own = [row for row in shown if "program" not in row and row["method"] == name]
        best = [row for row in own if not any(_beats(other, row) for other in own)]
        points = sorted((across(row["true_bits"]), up(row["perplexity"])) for row in best)
        picture.path(points, f"curve l{place}")
        for row in own:
            hint = f"{row['setting']}: {perplexity(row['perplexity'])} at {row['true_bits']:.2f} bits"
            radius = 4 if row in best else 2
            picture.dot(across(row["true_bits"]), up(row["perplexity"]), f"m{place}", hint=hint, radius=radius)
    colours = "\n".join(f".m{n} {{ fill: {c}; }} .l{n} {{ stroke: {c}; }}" for n, c in enumerate(_COLOURS))
    style = element("style", Markup(_STYLE + colours))
    head, _, body = picture.markup().partition(">")
    return f'{head} width="640" xmlns="http://www.w3.org/2000/svg">{style}{body}'


def perplexity(value: float) -> str:
    """As pages write it: four digits, or whole thousands apart."""
    value += 1e-9  # of two figures as near the one above
    if value >= 1e7:
        return f"{value / 1e6:.0f} million"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _figure(match: re.Match[str], found: dict[str, Row]) -> str:
    several = [found[name] for name in match[1].split()]
    if match[2] == " mean":
        values = [row["perplexity"] for row in several]
        return f"{mean(values):.1f} ± {stdev(values):.1f}"
    [row] = several
    if match[2] == " bits":
        return f"{row['true_bits']:.2f}"
    return perplexity(row["base_perplexity" if match[2] else "perplexity"])


def _beats(other: Row, row: Row) -> bool:
    """Whether another row has fewer bits or as many, and a lower perplexity."""
    return other["true_bits"] <= row["true_bits"] + 0.005 and other["perplexity"] < row["perplexity"]


def main() -> None:
    """Write what has changed, and name it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where something has to change")
    check = parser.parse_args().check
    changed = {path: text for path, text in pages() if not path.is_file() or path.read_text(encoding="utf-8") != text}
    for path, text in changed.items():
        print(path.relative_to(ROOT))
        if not check:
            path.write_text(text, encoding="utf-8")
    sys.exit(bool(changed) and check)


if __name__ == "__main__":
    main()
