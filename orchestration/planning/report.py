"""A plan as tables, and in plain values."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestration.planning.cost import STAGES
from orchestration.planning.plan import Assumptions, DataPlan, RunPlan

GPU_OVERHEAD = "CUDA's context and kernels' workspaces (about 1 GB) come on top"


def as_json(plan: RunPlan) -> dict[str, Any]:
    """The plan in plain values; bytes and seconds as they are."""
    fields = dataclasses.asdict(plan)
    for world, facts in zip(plan.worlds, fields["worlds"], strict=True):
        facts["state"] = {
            str(stage): {**dataclasses.asdict(state), "total": state.total}
            for stage, state in zip(STAGES, world.state, strict=True)
        }
    return fields


def show(plan: RunPlan, given: Assumptions, console: Console) -> None:
    """Prints a plan as tables."""
    console.print(f"[bold]{plan.recipe}[/]", _facts(plan), sep="\n")
    console.print("", _memory(plan), sep="\n")
    console.print("", _time(plan), sep="\n")
    for world in plan.worlds:
        if world.step_seconds is not None and world.hours is None:
            console.print(
                f"train.checkpoint_every: {_seconds(world.checkpoint_seconds)} between checkpoints of {world.workers} "
                f"workers, which fail more often than that; set it to about {world.best_steps}, or take fewer workers",
                style="yellow",
            )
    if plan.scales:
        console.print("", _growth(plan), sep="\n")
    console.print(
        f"\nBest: the time between checkpoints by Young and Daly. State is fp32; {GPU_OVERHEAD}. A node is lost every "
        f"{plan.mtbf_hours:g} hours and a rank writes {given.disk_mb_per_second:g} MB/s by assumption "
        "(train.mtbf_hours, --disk-mb-per-second); each worker has a machine of its own. Times of the run do not count "
        "communication; images a second do, from --observed, or --network-gbit and --latency-us, none of it hidden.",
        style="dim",
    )


def _facts(plan: RunPlan) -> Table:
    size, data = plan.size, plan.data
    facts = Table(box=None, show_header=False, pad_edge=False)
    frozen = f", {size.parameters - size.trained:,} of them frozen" if size.trained < size.parameters else ""
    facts.add_row("parameters", f"{size.parameters:,}{frozen}")
    every = "as often as loses least" if plan.checkpoint_every is None else f"every {plan.checkpoint_every} steps"
    facts.add_row("checkpoint", f"{_bytes(plan.checkpoint_bytes)}, {every}")
    facts.add_row("steps", f"{plan.steps:,} of {plan.batch_size} images, at any number of workers")
    if data.samples is not None:
        facts.add_row(
            "training set",
            f"{data.samples:,} images, {_size_of(data)}: {data.steps_per_epoch:,} steps an epoch, "
            f"{data.epochs:,.1f} epochs",
        )
    if data.note:
        facts.add_row("training set", data.note)
    facts.add_row("cache", _cache(data))
    facts.add_row("activations", f"{_bytes(plan.activations_per_sample)} for each image of a micro batch, an estimate")
    facts.add_row("times", plan.timing)
    return facts


def _memory(plan: RunPlan) -> Table:
    memory = Table(title="Memory of a rank", title_justify="left", box=None, pad_edge=False)
    memory.add_column("workers", justify="right")
    memory.add_column("micro batches", justify="right")
    for stage in STAGES:
        chosen = " (recipe)" if stage == plan.zero_stage else ""
        memory.add_column(f"ZeRO {stage}{chosen}", justify="right")
    memory.add_column("and activations", justify="right")
    for world in plan.worlds:
        memory.add_row(
            str(world.workers),
            f"{world.accumulation} x {world.micro_batch}",
            *(_bytes(state.total) for state in world.state),
            _bytes(world.activations),
        )
    return memory


def _time(plan: RunPlan) -> Table:
    time = Table(title="Time and checkpoints", title_justify="left", box=None, pad_edge=False)
    for column in ("workers", "a step", "checkpoints", "a save", "best", "in steps", "the run", "cost"):
        time.add_column(column, justify="right")
    for world in plan.worlds:
        never = world.step_seconds is not None and world.hours is None
        time.add_row(
            str(world.workers),
            _seconds(world.step_seconds),
            _seconds(world.checkpoint_seconds),
            _seconds(world.stall_seconds),
            _seconds(world.best_seconds),
            "unknown" if world.best_steps is None else f"{world.best_steps:,}",
            "never ends" if never else _seconds(None if world.hours is None else world.hours * 3600),
            "unknown" if world.cost is None else f"{world.cost:,.2f}",
        )
    return time


def _growth(plan: RunPlan) -> Table:
    each = min(plan.batch_size, plan.micro_batch)
    growth = Table(title="Images a second on more workers", title_justify="left", box=None, pad_edge=False)
    for column in ("workers", f"batches of {plan.batch_size}", f"{each} images a worker", "efficiency", "sent"):
        growth.add_column(column, justify="right")
    for scale in plan.scales:
        growth.add_row(
            str(scale.workers),
            "too small" if scale.fixed_batch is None else f"{scale.fixed_batch:,.0f}",
            f"{scale.grown_batch:,.0f}",
            f"{scale.efficiency:.0%}",
            f"{_bytes(scale.sent)} a step",
        )
    return growth


def _size_of(data: DataPlan) -> str:
    if data.bytes is None:
        return "of unknown size"
    return f"about {_bytes(data.bytes)}, still to be rendered" if data.estimated else _bytes(data.bytes)


def _cache(data: DataPlan) -> str:
    if data.cache_bytes is None:
        return f"at most {_bytes(data.cache_limit)} on each node"
    if data.cache_bytes == 0:
        return "none: shards are read where they lie"
    if data.bytes is not None and data.bytes > data.cache_limit:
        return (
            f"{_bytes(data.cache_limit)} on each node, less than the set: shards are fetched again in each epoch; "
            "raise data.cache.gigabytes"
        )
    return f"{_bytes(data.cache_bytes)} on each node"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"
