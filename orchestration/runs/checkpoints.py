"""One checkpoint format for every world size and ZeRO stage.

A checkpoint is a folder ``<steps done>-<token>``: one safetensors part for each rank (fp32 weights, Adam's moments and
persistent buffers by name; names are dealt out to the ranks), the curve's points since the checkpoint before, and a
manifest with the digest of every file, written last. A folder without a manifest is not a checkpoint. Nothing in it
is executable.
"""

import contextlib
import errno
import hashlib
import json
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from orchestration.engine import MOMENTS
from orchestration.evaluate import yardstick
from orchestration.runs.storage import Storage, read_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CURVE = "curve.json"
DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}  # any other error: the storage could not be asked
READERS = 4  # files that are checked at a time
Points = list[tuple[str, float, int, int]]
"""Points of the curves: (name, value, timestamp in ms, step)."""


class DamagedCheckpointError(Exception):
    """A file of a checkpoint is missing or does not have its digest."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint; its files may still turn out damaged.

    Fields:
        folder: the run's checkpoints.
        name: this one's folder in it.
    """

    folder: Storage
    name: str

    @property
    def files(self) -> Storage:
        return self.folder / self.name

    @property
    def url(self) -> str:
        return self.files.url

    @property
    def steps(self) -> int:
        """Steps done."""
        return steps_of(self.name)

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What is known of it: steps, digest of the recipe, world size, held-out metrics, digests of its files.

        Raises:
            DamagedCheckpointError: it is not there, or is not a manifest.
        """
        try:
            with _reading(f"{self.url}/{MANIFEST}"):
                manifest: dict[str, Any] = read_json(self.files, MANIFEST)
            manifest["files"].items()
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedCheckpointError(f"{self.url}: the manifest cannot be read ({error})") from error
        return manifest

    @property
    def evaluation(self) -> Mapping[str, float]:
        """Metrics on the held-out set, by name; empty where they were not measured at this step.

        Raises:
            DamagedCheckpointError.
        """
        evaluation: dict[str, float] = self.manifest.get("eval", {})
        return evaluation

    def read(self, name: str) -> bytes:
        """A file's content, checked against the manifest.

        Raises:
            DamagedCheckpointError: it is missing or has another digest.
        """
        with _reading(f"{self.url}/{name}"):
            content = self.files.read(name)
        self._check(name, hashlib.sha256(content).hexdigest())
        return content

    def validate(self) -> None:
        """Raises: DamagedCheckpointError."""
        with ThreadPoolExecutor(READERS) as pool:
            for name, digest in zip(
                self.manifest["files"], pool.map(self._digest, self.manifest["files"]), strict=True
            ):
                self._check(name, digest)

    def _digest(self, name: str) -> str:
        with _reading(f"{self.url}/{name}"), self.files.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

    def _check(self, name: str, digest: str) -> None:
        if digest != self.manifest["files"].get(name):
            raise DamagedCheckpointError(f"{self.url}/{name}: the digest is not the manifest's")

    def weights(self) -> dict[str, Tensor]:
        """Weights and persistent buffers: the module's state_dict."""
        return {name: state["weight"] for name, state in self.tensors().items()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """weight, exp_avg and exp_avg_sq of each trained parameter, the weight alone of anything else, by name.

        Raises:
            DamagedCheckpointError: a part is missing or has another digest.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        for part in sorted(name for name in self.manifest["files"] if name.endswith(".safetensors")):
            try:
                content = load(self.read(part))
            except SafetensorError as error:
                raise DamagedCheckpointError(f"{self.url}/{part}: not safetensors ({error})") from error
            for key, value in content.items():
                kind, _, name = key.partition("/")
                tensors.setdefault(name, {})[kind] = value
        return tensors

    def points(self) -> Points:
        """The curve's points since the checkpoint before."""
        return [(name, value, when, step) for name, value, when, step in json.loads(self.read(CURVE))]


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DAMAGE:
            raise
        raise DamagedCheckpointError(f"{url}: the file cannot be read ({error})") from error


def committed(folder: Storage) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first; those that are not committed are left out."""
    found = []
    for file in folder.files():
        name, _, inner = file.name.partition("/")
        if inner == MANIFEST and name[:1].isdigit():
            found.append((steps_of(name), file.modified, name))
    return [Checkpoint(folder, name) for _, _, name in sorted(found)]


def newest_valid(folder: Storage) -> Checkpoint | None:
    """The newest checkpoint whose files all have their digests. Damaged ones are put aside, with a warning.

    Raises:
        OSError: the storage cannot be asked; that is no damage.
    """
    for checkpoint in reversed(committed(folder)):
        try:
            checkpoint.validate()
        except DamagedCheckpointError as error:
            put_aside(checkpoint, error)
        else:
            return checkpoint
    return None


def best(checkpoints: Sequence[Checkpoint], metric: str | None = None) -> Checkpoint | None:
    """The one that does best on the held-out set, by the registry's measure; the newest of equals.

    None where no checkpoint was taken at a step of an evaluation.

    Args:
        metric: ``registry.metric`` of the recipe.
    """
    scored = []
    for checkpoint in checkpoints:
        with contextlib.suppress(DamagedCheckpointError):  # whoever uses it says so
            measure, sign = yardstick(checkpoint.evaluation, metric)
            if measure in checkpoint.evaluation:
                scored.append((sign * checkpoint.evaluation[measure], checkpoint.steps, checkpoint))
    known = [entry for entry in scored if entry[0] == entry[0]]  # not NaN
    return max(known, key=lambda entry: entry[:2], default=(0.0, 0, None))[2]


def put_aside(checkpoint: Checkpoint, error: DamagedCheckpointError) -> None:
    """Renames a damaged checkpoint, so that it is neither used nor deleted, and says so."""
    aside = f"damaged-{checkpoint.name}"
    checkpoint.folder.move(checkpoint.name, aside)
    logger.warning("damaged checkpoint: %s; using the one before, this one is now %s", error, aside)


def prune(folder: Storage, keep: int, sent: Container[str], metric: str | None = None) -> None:
    """Deletes all but the newest ``keep`` checkpoints and the best one, and what older attempts left uncommitted.

    Args:
        sent: names of the checkpoints whose points have arrived; the others stay, however old.
        metric: that says which is best; see ``best``.
    """
    checkpoints = committed(folder)
    kept = {checkpoint.name for checkpoint in [*checkpoints[-keep:], best(checkpoints, metric)] if checkpoint}
    for checkpoint in checkpoints:
        if checkpoint.name not in kept and checkpoint.name in sent:
            discard(folder, checkpoint.name)
    if checkpoints:
        names = {file.name.partition("/")[0] for file in folder.files()}
        whole = {checkpoint.name for checkpoint in checkpoints}
        for name in names - whole:
            if name[:1].isdigit() and steps_of(name) < checkpoints[-1].steps:
                discard(folder, name)


def discard(folder: Storage, name: str) -> None:
    """Deletes a checkpoint, or what there is of it."""
    folder.delete(f"{name}/{MANIFEST}")  # first, so that no half of it looks whole
    with contextlib.suppress(OSError):  # an attempt that is dying still writes into it: the next pruning gets it
        folder.delete(name)


def restore(checkpoint: Checkpoint, module: torch.nn.Module) -> dict[str, dict[str, Tensor]]:
    """Loads a checkpoint's weights into a module (before its engine is made) and returns the moments by name.

    Raises:
        DamagedCheckpointError: its parameters are not the module's.
    """
    tensors = checkpoint.tensors()
    state = module.state_dict()
    if tensors.keys() != state.keys():
        odd = sorted(tensors.keys() ^ state.keys())
        raise DamagedCheckpointError(f"{checkpoint.url}: parameters differ from the model's: {odd[:5]}")
    module.load_state_dict({name: values["weight"] for name, values in tensors.items()})
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return {name: {key: tensors[name][key] for key in MOMENTS} for name in trained}


def name_of(steps: int, token: str) -> str:
    return f"{steps:09d}-{token}"


def steps_of(name: str) -> int:
    return int(name.partition("-")[0])


def part_of(rank: int) -> str:
    return f"part-{rank:05d}.safetensors"
