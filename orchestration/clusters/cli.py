"""slotforge cluster ..."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from orchestration.command_line import console, fail, say
from orchestration.wording import counted

cluster = typer.Typer(
    help="Clusters to train on: one on this machine to try, and the check of a file before machines are rented.",
    epilog="Start with: slotforge cluster up --local 2; slotforge submit demo; slotforge cluster down",
    no_args_is_help=True,
)


@cluster.command(epilog="For example: slotforge cluster check cluster.yaml && ray up cluster.yaml")
def check(
    file: Annotated[Path, typer.Argument(help="a file for ray up (AWS, GCP), or a RayJob or RayCluster for KubeRay")],
) -> None:
    """Check a cluster file by Ray's own rules and by ours; exits with 1 and names what is wrong.

    Ours see what Ray passes on unread: fields of node_config, machines against declared resources, the image against
    the Ray that the project pins, spot and its fallback, what is public, the token, MLflow's bucket, secrets.
    """
    from orchestration.clusters.check import ClusterFileError, check_cluster

    errors = Console(stderr=True, soft_wrap=True)
    try:
        verdict = check_cluster(file)
    except ClusterFileError as error:
        fail(str(error), 2)
    for problem in verdict.problems:
        errors.print(problem, style="red", highlight=False, markup=False)
    if verdict.problems:
        fail(f"{file}: {counted(len(verdict.problems), 'problem')}", 1)
    for fact in verdict.right:
        say(fact)
    for place in verdict.open:
        console.print(f"to fill in: {place}", style="yellow", highlight=False, markup=False)
    say(f"{file}: nothing is wrong")


@cluster.command(epilog="For example: slotforge cluster up --local 2; slotforge submit demo; slotforge cluster down")
def up(
    local: Annotated[int, typer.Option(min=1, help="most worker nodes; they come when a run asks for them")],
) -> None:
    """Start a cluster of several nodes on this machine, to try growing, the loss of a node and preemption.

    Ray's own autoscaler brings and ends the nodes, which are processes here with a CPU each, though they share the
    machine's. Everything is on loopback and asks for a token. A cluster in the cloud is started by: ray up cluster.yaml
    """
    from orchestration.clusters.local import IDLE_MINUTES, LocalClusterError, node_ids
    from orchestration.clusters.local import up as start

    try:
        with console.status("starting Ray"):
            found = start(local)
    except LocalClusterError as error:
        fail(str(error), 1)
    one = node_ids(1)[0]
    exports = " ".join(f"{name}={value}" for name, value in found.environment().items())
    say(f"0 to {local} nodes at {found.address}; idle ones go after {IDLE_MINUTES:g} min. Try:\n")
    say(f"  slotforge submit demo --set 'parallel.workers={{min: 1, max: {local}}}'\n")
    say("and meanwhile, from another terminal:\n")
    say(f"  export {exports}")
    say(f"  ray status --address {found.gcs}")
    say(f"  pkill -9 -f '{found.folder}.*{one}'         # the first node dies; another one comes for it")
    say(
        f"  ray drain-node --address {found.gcs} --node-id {one} --reason DRAIN_NODE_REASON_PREEMPTION \\\n"
        "      --reason-message spot --deadline-remaining-seconds 60       # it is told that it will be taken away\n"
    )
    say("slotforge cluster down ends everything.")


@cluster.command()
def down() -> None:
    """End the cluster that `slotforge cluster up` has started, with all that runs on it."""
    from orchestration.clusters.local import down as end

    with console.status("ending the local cluster"):
        found = end()
    say("no local cluster is up" if found is None else f"the cluster at {found.address} has ended")
