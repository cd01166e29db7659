"""What storing scales and norms in float16 costs: the held-out loss before and after they were rounded.

    python benchmarks/half_precision.py ARTIFACT [--results FILE]

ARTIFACT came out of ``ulbq quantize … --end-to-end LOSS``. Its manifest has the held-out loss of the epoch that was
stored, with scales and norms in float32 as they trained; here the model is built from what is stored, and loses on the
same samples. It must have been the last phase, on the calibration samples.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from ulbq.artifacts.manifest import QuantizedManifest, read_manifest
from ulbq.config.quantize import QuantizeRequest
from ulbq.data.calibration import CALIBRATION_FILE, load_calibration
from ulbq.finetuning.examples import Examples
from ulbq.finetuning.trainer import Trainer
from ulbq.pipeline.quantization_plan import prepare
from ulbq.pipeline.student import Folders, build_student
from ulbq.progress import Silent
from ulbq.runtime import calm_threads, versions
from ulbq.training.optimizer import lr_factor


def main() -> None:
    """Print both losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--results", type=Path, help="write them as JSON")
    options = parser.parse_args()
    calm_threads()
    torch.set_num_threads(1)
    manifest = read_manifest(options.artifact)
    if not isinstance(manifest, QuantizedManifest) or manifest.end_to_end is None or manifest.end_to_end.loss != "ce":
        raise SystemExit(f"{options.artifact} was not trained end to end with 'ce'")
    asked = QuantizeRequest.model_validate(manifest.request)
    request = asked.model_copy(update={"source": str(options.artifact), "out": None, "start": None})
    job = prepare(request, Silent())
    settings = job.method.needs.end_to_end
    assert settings is not None
    text = load_calibration(options.artifact / CALIBRATION_FILE)
    examples = Examples(text.tokens, job.request.text_samples, text.mask)
    with tempfile.TemporaryDirectory() as scratch:
        folders = Folders(options.artifact, Path(scratch))
        student = build_student(job, folders, train=settings.train, checkpointing=settings.checkpointing)
        named = {"schedule": lr_factor, "seeds": int, "folder": Path(scratch)}
        with Silent().phase("evaluation") as bar:
            stored = Trainer(student, None, examples, settings, **named).evaluate(bar)
    trained = manifest.end_to_end.end_error
    row = {"artifact": manifest.name, "float32": trained, "float16": stored, "times": stored / trained}
    print(json.dumps(row))
    if options.results:
        options.results.write_text(json.dumps(row | {"versions": versions()}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
