"""slotforge cluster ..."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

cluster = typer.Typer(
    help="Clusters to train on: check a cluster file before any machine is rented.",
    epilog="Start with: slotforge cluster check cluster.yaml",
    no_args_is_help=True,
)


@cluster.callback()
def _commands() -> None:
    """A group, also while it has one command."""


@cluster.command(epilog="For example: slotforge cluster check cluster.yaml && ray up cluster.yaml")
def check(
    file: Annotated[Path, typer.Argument(help="a file for ray up (AWS, GCP), or a RayJob or RayCluster for KubeRay")],
) -> None:
    """Check a cluster file by Ray's own rules and by ours; exits with 1 and names what is wrong.

    Ours see what Ray passes on unread: fields of node_config, machines against declared resources, the image against
    the Ray that the project pins, spot and its fallback, what is public, the token, MLflow's bucket, secrets.
    """
    from orchestration.clusters.check import ClusterFileError, check_cluster

    out, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    try:
        verdict = check_cluster(file)
    except ClusterFileError as error:
        errors.print(f"slotforge: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    for problem in verdict.problems:
        errors.print(problem, style="red", highlight=False, markup=False)
    if verdict.problems:
        errors.print(f"slotforge: {file}: {len(verdict.problems)} problems", style="red", highlight=False, markup=False)
        raise typer.Exit(1)
    for fact in verdict.right:
        out.print(fact, highlight=False, markup=False)
    for place in verdict.open:
        out.print(f"to fill in: {place}", style="yellow", highlight=False, markup=False)
    out.print(f"{file}: nothing is wrong", highlight=False, markup=False)
