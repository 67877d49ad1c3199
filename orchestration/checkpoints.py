"""One checkpoint format for every world size and ZeRO stage.

A checkpoint is a folder ``<steps done>-<token>``: one safetensors part for each rank (fp32 weights, Adam's moments and
persistent buffers by name; names are dealt out to the ranks), the curve's points since the checkpoint before, and a
manifest with the digest of every file, written last. A folder without a manifest is not a checkpoint. Nothing in it
is executable.
"""

import contextlib
import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from orchestration.engine import MOMENTS, Engine
from orchestration.files import read_json, sha256, write_bytes, write_json
from orchestration.worker import DivergedError

logger = logging.getLogger(__name__)

PART_SECONDS = 300.0  # how long rank 0 waits for the parts of the others
Points = list[tuple[str, float, int, int]]
"""Points of the curves: (name, value, timestamp in ms, step)."""


class DamagedCheckpointError(Exception):
    """A file of a checkpoint is missing or does not have its digest."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint; its files may still turn out damaged."""

    path: Path

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.path.name.partition("-")[0])

    def manifest(self) -> dict[str, Any]:
        """Raises: DamagedCheckpointError."""
        try:
            manifest: dict[str, Any] = read_json(self.path / "manifest.json")
            manifest["files"].items()
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedCheckpointError(f"{self.path}: the manifest cannot be read ({error})") from error
        return manifest

    def read(self, name: str) -> bytes:
        """A file's content, checked against the manifest.

        Raises:
            DamagedCheckpointError: it is missing or has another digest.
        """
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise DamagedCheckpointError(f"{self.path / name}: the file cannot be read ({error})") from error
        if sha256(content) != self.manifest()["files"].get(name):
            raise DamagedCheckpointError(f"{self.path / name}: the digest is not the manifest's")
        return content

    def validate(self) -> None:
        """Raises: DamagedCheckpointError."""
        for name in self.manifest()["files"]:
            self.read(name)

    def weights(self) -> dict[str, Tensor]:
        """Weights and persistent buffers: the module's state_dict."""
        return {name: state["weight"] for name, state in self.tensors().items()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """weight, exp_avg and exp_avg_sq of each trained parameter, the weight alone of anything else, by name.

        Raises:
            DamagedCheckpointError: a part is missing or has another digest.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        for part in sorted(name for name in self.manifest()["files"] if name.endswith(".safetensors")):
            try:
                content = load(self.read(part))
            except SafetensorError as error:
                raise DamagedCheckpointError(f"{self.path / part}: not safetensors ({error})") from error
            for key, value in content.items():
                kind, _, name = key.partition("/")
                tensors.setdefault(name, {})[kind] = value
        return tensors

    def points(self) -> Points:
        """The curve's points since the checkpoint before."""
        return [(name, value, when, step) for name, value, when, step in json.loads(self.read("curve.json"))]


def committed(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first; those that are not committed are left out."""
    found = []
    for path in folder.glob("[0-9]*/manifest.json"):
        with contextlib.suppress(FileNotFoundError):  # put aside or pruned this moment
            found.append((int(path.parent.name.partition("-")[0]), path.stat().st_mtime, Checkpoint(path.parent)))
    return [checkpoint for _, _, checkpoint in sorted(found, key=lambda entry: entry[:2])]


def newest_valid(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose files all have their digests. Damaged ones are put aside, with a warning."""
    for checkpoint in reversed(committed(folder)):
        try:
            checkpoint.validate()
        except DamagedCheckpointError as error:
            put_aside(checkpoint, error)
        else:
            return checkpoint
    return None


def put_aside(checkpoint: Checkpoint, error: DamagedCheckpointError) -> None:
    """Renames a damaged checkpoint, so that it is neither used nor deleted, and says so."""
    aside = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
    checkpoint.path.rename(aside)
    logger.warning("damaged checkpoint: %s; using the one before, this one is now %s", error, aside.name)


def prune(folder: Path, keep: int, sent: Container[str]) -> None:
    """Deletes all but the newest ``keep`` checkpoints, and what older attempts left without a manifest.

    Args:
        sent: names of the checkpoints whose points have arrived; the others stay, however old.
    """
    checkpoints = committed(folder)
    for checkpoint in checkpoints[:-keep]:
        if checkpoint.path.name not in sent:
            continue
        (checkpoint.path / "manifest.json").unlink()  # first, so that no half of it looks whole
        shutil.rmtree(checkpoint.path)
    if checkpoints:
        for path in folder.glob("[0-9]*"):
            old = int(path.name.partition("-")[0]) < checkpoints[-1].steps
            if old and not (path / "manifest.json").exists():
                shutil.rmtree(path, ignore_errors=True)


class Saver:
    """Saves checkpoints of one rank: a snapshot now, written and committed by a thread.

    Args:
        folder: the run's checkpoints.
        token: of this attempt, the same on all ranks: a rank of an earlier attempt cannot write into a later one.
        allowed: called by rank 0 before it commits; raises if the run has another driver by now.
    """

    def __init__(self, folder: Path, token: str, rank: int, world: int, allowed: Callable[[], None]) -> None:
        self._folder, self._token, self._rank, self._world, self._allowed = folder, token, rank, world, allowed
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, steps: int, engine: Engine, points: Points, facts: dict[str, Any]) -> None:
        """Takes the state after ``steps`` steps. All ranks call it together; rank 0 has the points.

        Raises:
            OSError, LeaseLostError, TimeoutError: the checkpoint before could not be written.
            DivergedError: its state was not finite; it was not written.
        """
        self.wait()
        tensors = {
            f"{kind}/{name}": value for name, state in engine.named_state(owned=True) for kind, value in state.items()
        }
        path = self._folder / f"{steps:09d}-{self._token}"
        self._thread = threading.Thread(
            target=self._write, args=(path, tensors, points, facts), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is committed (rank 0) or its part is written. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _write(self, path: Path, tensors: dict[str, Tensor], points: Points, facts: dict[str, Any]) -> None:
        try:
            for name, value in tensors.items():
                if not value.isfinite().all():  # the loss of a step cannot tell what its own update did
                    raise DivergedError(f"{name} is not finite after step {int(path.name.partition('-')[0])}")
            content = save(tensors)
            write_bytes(path / _part(self._rank), content)
            write_json(path / f"{_part(self._rank)}.json", {"sha256": sha256(content)})
            if self._rank == 0:
                self._commit(path, points, facts)
        except BaseException as error:  # raised again by wait, on the training thread
            self._error = error

    def _commit(self, path: Path, points: Points, facts: dict[str, Any]) -> None:
        write_json(path / "curve.json", points)
        files = {"curve.json": sha256((path / "curve.json").read_bytes())}
        deadline = time.monotonic() + PART_SECONDS
        for rank in range(self._world):
            note = path / f"{_part(rank)}.json"
            while not note.exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{note}: rank {rank} did not write its part in {PART_SECONDS:.0f} s")
                time.sleep(0.01)
            files[_part(rank)] = read_json(note)["sha256"]
        self._allowed()
        write_json(path / "manifest.json", {**facts, "files": files})


def new_token() -> str:
    """Names an attempt: unique, not secret, without meaning for what is computed."""
    return secrets.token_hex(4)


def restore(checkpoint: Checkpoint, module: torch.nn.Module) -> dict[str, dict[str, Tensor]]:
    """Loads a checkpoint's weights into a module (before its engine is made) and returns the moments by name.

    Raises:
        DamagedCheckpointError: its parameters are not the module's.
    """
    tensors = checkpoint.tensors()
    state = module.state_dict()
    if tensors.keys() != state.keys():
        odd = sorted(tensors.keys() ^ state.keys())
        raise DamagedCheckpointError(f"{checkpoint.path}: parameters differ from the model's: {odd[:5]}")
    module.load_state_dict({name: values["weight"] for name, values in tensors.items()})
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return {name: {key: tensors[name][key] for key in MOMENTS} for name in trained}


def _part(rank: int) -> str:
    return f"part-{rank:05d}.safetensors"
