"""``ulbq quantize``: a model in, a packed artifact out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ulbq.config.options import former_names
from ulbq.config.quantize import QuantizeRequest, default_words, for_method

from . import console
from .fields import Settings, from_fields, read_settings
from .options import Debug, DryRun, Json, Quiet, Source, check_out, read_source
from .plan_table import show_plan
from .recipe_list import complete_recipe, show_recipes
from .sections import HelpAll
from .streams import write as say

_DEFAULT_METHOD = "db-llm"

Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE.yaml",
        help="Options from a file or a shipped recipe. What is typed wins (--stage over its epochs, and the reverse).",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
ListRecipes = Annotated[
    bool,
    typer.Option("--list-recipes", help="Show the shipped recipes, then stop.", is_eager=True, callback=show_recipes),
]
WritePlan = Annotated[
    Path | None,
    typer.Option(
        "--write-plan",
        metavar="FILE",
        help="Write the layers' settings for --plan. As planned with --dry-run, else as made.",
        show_default=False,
        rich_help_panel="Run",
    ),
]


@from_fields(QuantizeRequest, default=default_words, taken=for_method)
def quantize(
    source: Source = None,
    recipe: Recipe = None,
    list_recipes: ListRecipes = False,
    settings: Settings = None,
    help_all: HelpAll = False,
    dry_run: DryRun = False,
    write_plan: WritePlan = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Quantize a model to 1 to 4 bits, one block at a time. A stopped run goes on where it was."""
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(given["out"], force=given["force"])

    if write_plan is not None:
        from ulbq.pipeline.layer_plan import check_plan_file

        check_plan_file(write_plan, given["out"])

    from ulbq.pipeline.recipes import OPTIONS, load, request_of

    given |= read_settings(settings or (), OPTIONS, given, former_names(QuantizeRequest))
    if recipe is None:
        given["method"] = given["method"] or _DEFAULT_METHOD
    request = request_of(given, None if recipe is None else load(recipe))
    # Last: this may wait for a pipe.
    request = request.model_copy(update={"source": read_source(source, "model", progress)})

    from ulbq.pipeline.layer_plan import write_plan as write
    from ulbq.pipeline.quantize import plan, quantize

    if dry_run:
        planned = plan(request, progress)
        if write_plan is not None:
            write(write_plan, planned)
        show_plan(planned)
        if json:
            say(planned.model_dump_json(indent=2))
        return
    plans = []

    def on_plan(planned: Any) -> None:
        plans.append(planned)
        if not quiet:
            show_plan(planned)

    path, manifest = quantize(request, progress, on_plan=on_plan)
    if write_plan is not None:
        write(write_plan, plans[0], manifest.layers)
    if not quiet:
        from .results import show_quantized

        show_quantized(path, manifest)
    emit(path, manifest)
