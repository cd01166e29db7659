"""Keep what a sweep measured as a file of results, which ``tables.py`` writes into the docs and ``measured.py`` reads.

    ulbq sweep smollm2-135m --method rtn,gptq,claq,efficientqat,db-llm,apiq,trellis --bits 2,3 --seeds 0,1 \
        --calibration wikitext2 --samples 32 --sequence-length 512 -o sweep/
    python benchmarks/swept.py sweep/ benchmarks/results/swept-methods-cpu.json

A setting has its numbers over the seeds in the order of the runs: ``values`` those of ``ulbq eval``, ``better`` 1 where
more is better and -1 where less is. ``bits`` is the mean, ``size`` in bytes, ``seconds`` of quantizing, ``peak_memory``
the largest resident memory in bytes. ``evidence`` is what ``recommend`` takes, where WikiText-2 was measured. ``front``
are the settings that no other beats with as few bits.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ulbq.artifacts import SweepManifest, read_manifest
from ulbq.evaluation.results import Results
from ulbq.pipeline.evidence import of_sweep
from ulbq.pipeline.sweep_points import by_setting, front, measured


def kept(manifest: SweepManifest) -> dict[str, Any]:
    """What stays of a sweep."""
    results = Results.model_validate(manifest.results)
    full = measured(results.models[0])
    points = by_setting(manifest.runs, results)
    better = {name: sign for one in results.models[1:2] for name, (_, sign) in measured(one).items()}
    evidence = {
        one.name: one.model_dump(mode="json", exclude_defaults=True, exclude={"sha256"}) for one in of_sweep(manifest)
    }
    settings = {
        point.setting: {
            "method": point.runs[0].method,
            "bits": point.bits,
            "size": max(run.size for run in point.runs),
            "seconds": [run.seconds for run in point.runs],
            "resumed": any(run.resumed for run in point.runs),
            "peak_memory": max(run.peak_memory for run in point.runs),
            "values": point.values,
            "evidence": evidence.get(point.setting),
        }
        for point in points
    }
    return {
        "model": manifest.parents[0].name,
        "device": manifest.device,
        "versions": manifest.versions,
        "protocol": results.protocol.model_dump(mode="json"),
        "full": {name: value for name, (value, _) in full.items()},
        "better": better,
        "front": {name: [point.setting for point in front(points, name, sign)] for name, sign in better.items()},
        "left_out": manifest.left_out,
        "settings": settings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    manifest = read_manifest(options.artifact)
    if not isinstance(manifest, SweepManifest):
        sys.exit(f"{options.artifact} is no sweep.")
    options.results.write_text(json.dumps(kept(manifest), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
