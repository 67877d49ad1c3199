"""slotforge plan"""

from typing import Annotated

import typer

from orchestration.command_line import Overrides, RecipeName, console, fail
from orchestration.recipe_files import RecipeError


def plan(
    recipe: RecipeName,
    overrides: Overrides = [],  # noqa: B006 typer reads it, nothing writes it
    step_seconds: Annotated[float | None, typer.Option(help="seconds of one step, measured where it will run")] = None,
    step_workers: Annotated[int | None, typer.Option(help="workers of that step; parallel.workers.min")] = None,
    measure: Annotated[bool, typer.Option(help="time a few steps on this machine's CPU, if none is given")] = True,
    price_per_hour: Annotated[float | None, typer.Option(help="of one worker's machine; or the recipe's")] = None,
    disk_mb_per_second: Annotated[float, typer.Option(help="that one worker writes of a checkpoint")] = 200.0,
    observed: Annotated[
        list[str],
        typer.Option(metavar="WORKERS:BATCH:SECONDS", help="a small run's workers, global batch and seconds a step"),
    ] = [],  # noqa: B006
    network_gbit: Annotated[float, typer.Option(help="a rank sends, where no run observed has two workers")] = 10.0,
    latency_us: Annotated[float, typer.Option(help="of a message, where runs observed cannot tell")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="plain values, in bytes and seconds")] = False,
) -> None:
    """Say what a recipe will take, before any money is spent: memory, steps, checkpoints, time and cost."""
    import json

    from orchestration.planning import report
    from orchestration.planning.plan import Assumptions, plan_run
    from orchestration.recipe import load_recipe

    try:
        given = Assumptions(
            *(step_seconds, step_workers, measure, disk_mb_per_second, price_per_hour),
            *(tuple(_observed(text) for text in observed), network_gbit, latency_us),
        )
        found = plan_run(load_recipe(recipe, overrides), given)
    except RecipeError as error:
        fail(str(error), 2)
    if as_json:
        print(json.dumps(report.as_json(found), indent=1))
        return
    report.show(found, given, console)


def _observed(text: str) -> tuple[int, int, float]:
    try:
        workers, batch, seconds = text.split(":")
        found = int(workers), int(batch), float(seconds)
    except ValueError:
        found = 0, 0, 0.0
    if found[0] < 1 or found[1] < found[0] or not 0 < found[2] < float("inf"):
        raise RecipeError(f"--observed: {text!r} is not workers:batch:seconds; write e.g. 2:64:0.35")
    return found
