"""``ulbq sweep``: many quantization runs of one model, side by side."""

from typing import Any

from ulbq.config.options import Option, former_names
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.sweep import SweepRequest

from . import console
from .fields import Settings, asked, from_fields, read_settings
from .options import Debug, DryRun, Json, Quiet, Source, check_out, read_source
from .sections import HelpAll
from .streams import write


def _default(name: str, option: Option) -> str:
    """What an option is where nobody says."""
    return {"perplexity": "wikitext2", "limit": "32 on a CPU, else all"}.get(name, option.default)


@from_fields(SweepRequest, default=_default)
def sweep(
    source: Source = None,
    settings_of_all: Settings = None,
    help_all: HelpAll = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Quantize a model by many settings, and compare what comes of them. A stopped sweep goes on where it was.

    The settings are a grid, as in --method rtn,gptq --bits 2,3 --seeds 0,1, or the list in a file. Every run is
    measured: perplexity, fidelity to the full-precision model, and tasks where they are asked for.
    """
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(given["out"], force=given["force"])

    from ulbq.pipeline.recipes import OPTIONS

    options = read_settings(settings_of_all or (), OPTIONS, given, former_names(QuantizeRequest))
    request = SweepRequest.model_validate({**asked(given), "options": options})
    request = request.model_copy(update={"source": read_source(source, "model", progress)})

    from ulbq.pipeline.sweep import plan, sweep

    from .sweep_table import show_plan, show_sweep

    if dry_run:
        planned = plan(request, progress)
        show_plan(planned)
        if json:
            write(planned.model_dump_json(indent=2))
        return
    path, manifest = sweep(request, progress, on_plan=(lambda planned: None) if quiet else show_plan)
    if not quiet:
        show_sweep(path, manifest)
    emit(path, manifest)
