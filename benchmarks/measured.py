"""Write ``ulbq/pipeline/measured.json``, which ``ulbq recommend`` reads, from ``benchmarks/results/``.

    python benchmarks/measured.py [--check]

A setting of ``quality-*.json`` that went on from another's artifact stands there as the one command that does both, its
seeds together. One of a sweep, ``swept-*.json``, takes the place of that with its options on its model. Other programs,
and those that lost the model, are left out.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import typer
from quality import SETTINGS

from ulbq.commands.app import app
from ulbq.commands.fields import asked
from ulbq.config.quantize import QuantizeRequest
from ulbq.pipeline.evidence import Evidence

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "ulbq" / "pipeline" / "measured.json"
MODEL, WEIGHTS, FULL = "SmolLM2-135M-Instruct", 106_168_320, 24.19
"""The default model, how many of its weights are quantized, and its perplexity in full precision."""
MOST = 100.0
"""Ratio of perplexities beyond which nothing is left of the model."""


def options(name: str) -> dict[str, Any]:
    """Of a setting as a request has them, those of the artifact that it went on from among them."""
    group: Any = typer.main.get_command(app)
    setting = SETTINGS[name]
    given = group.commands["quantize"].make_context("quantize", list(setting.options)).params
    fields = {field: value for field, value in asked(given).items() if field in QuantizeRequest.model_fields}
    request = QuantizeRequest.model_validate(fields)
    found = request.model_dump(mode="json", exclude_defaults=True, exclude={"seed"})
    own = {field: value for field, value in found.items() if value != []}
    if setting.start is None:
        return own
    # Its blocks stay.
    return {**options(setting.start), **{key: value for key, value in own.items() if (key, value) != ("epochs", 0)}}


def table() -> list[Evidence]:
    """Every setting."""
    found = {(one.model, json.dumps(one.options, sort_keys=True)): one for one in (*single(), *swept())}
    return sorted(found.values(), key=lambda one: one.name)


def swept() -> Iterator[Evidence]:
    """Every setting of a sweep."""
    for file in sorted((ROOT / "benchmarks" / "results").glob("swept-*.json")):
        for row in json.loads(file.read_text(encoding="utf-8"))["settings"].values():
            found = row["evidence"] and Evidence.model_validate(row["evidence"])
            if found and found.ratio <= MOST:
                yield found


def single() -> Iterator[Evidence]:
    """Every setting of the runs one by one, its seeds together."""
    files = sorted((ROOT / "benchmarks" / "results").glob("quality-*.json"))
    rows = {row["setting"]: row for file in files for row in json.loads(file.read_text(encoding="utf-8"))}
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        if "program" not in row and row["perplexity"] / FULL <= MOST:
            groups.setdefault(_unseeded(name), []).append(row)
    for name, members in sorted(groups.items()):
        seconds = _seconds(members[0]["setting"], groups)
        yield Evidence(
            name=name,
            options=options(members[0]["setting"]),
            model=MODEL,
            weights=WEIGHTS,
            ratios=tuple(round(row["perplexity"] / FULL, 4) for row in members),
            seconds=None if seconds is None else round(seconds),
            device=next((row["device"] for row in members if "seconds" in row), ""),
        )


def _unseeded(name: str) -> str:
    return re.sub(r"-s\d+(?=-|$)", "", name)


def _seconds(name: str, groups: dict[str, list[dict[str, Any]]]) -> float | None:
    """Of a setting, and of those that it went on from, the mean over seeds; None where one of them is not known."""
    known = [row["seconds"] for row in groups.get(_unseeded(name), ()) if "seconds" in row]
    start = SETTINGS[name].start
    if not known or start is None:
        return mean(known) if known else None
    before = _seconds(start, groups)
    return None if before is None else mean(known) + before


def text() -> str:
    """The file, a row a setting."""
    lines = (json.dumps(one.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False) for one in table())
    return "[\n" + ",\n".join(lines) + "\n]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say whether the file is up to date, and write nothing")
    wanted = text()
    if not parser.parse_args().check:
        TABLE.write_text(wanted, encoding="utf-8")
    elif TABLE.read_text(encoding="utf-8") != wanted:
        sys.exit(f"{TABLE.relative_to(ROOT)} is not up to date: run python benchmarks/measured.py")


if __name__ == "__main__":
    main()
