"""Saves checkpoints behind training: a snapshot now, written and committed by a thread."""

import contextlib
import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from orchestration.engine import Engine
from orchestration.runs.checkpoints import CURVE, MANIFEST, Points, discard, name_of, part_of
from orchestration.runs.snapshot import Snapshot
from orchestration.runs.storage import Storage, to_json
from orchestration.worker import DivergedError

logger = logging.getLogger(__name__)

PART_SECONDS = 300.0  # how long rank 0 waits for the parts of the others, and they for its word
HEARD_SECONDS = 10.0  # how long rank 0 waits until the others have heard it
LOOK_SECONDS = 0.01
Word = dict[str, str]
"""What ranks tell each other of a save: {"sha256": of a part}, {"failed": why} or {"diverged": why}; {} is success."""


class NotSavedError(Exception):
    """The last checkpoint of a run could not be saved."""


def new_token() -> str:
    """Names an attempt: unique, not secret, without meaning for what is computed."""
    return secrets.token_hex(4)


class Saver:
    """Saves the checkpoints of one rank.

    The ranks tell each other on a board they share how their parts went; rank 0 commits, and all know whether it did.
    Storage that is full or does not answer costs a checkpoint and a warning, not the run: training goes on, and the
    curve's points go with the next checkpoint. Memory for one snapshot is kept from the first save on.

    Args:
        folder: the run's checkpoints.
        token: of this attempt, the same on all ranks: a rank of an earlier attempt cannot write into a later one.
        rank, world: this rank, and how many there are.
        allowed: called by rank 0 before it commits; raises if the run has another driver by now.
        board: a store that the ranks share, rank 0's process its server; a rank alone needs none.
    """

    def __init__(
        self,
        folder: Storage,
        token: str,
        rank: int,
        world: int,
        allowed: Callable[[], None],
        board: Store | None = None,
    ) -> None:
        if world > 1 and board is None:
            raise ValueError(f"board: {world} ranks need one to tell each other how their parts went")
        self._folder, self._token, self._rank, self._world = folder, token, rank, world
        self._allowed, self._board = allowed, board
        self._snapshot = Snapshot()
        self._unsaved: Points = []
        self._jobs: SimpleQueue[tuple[int, Points, dict[str, Any]]] = SimpleQueue()
        self._over = threading.Event()
        self._over.set()
        self._thread: threading.Thread | None = None  # one for all saves: starting one waits for it
        self._failure: str | None = None  # of the last save
        self._error: BaseException | None = None
        self._newest: int | None = None

    @property
    def newest(self) -> int | None:
        """Steps of the newest checkpoint that this attempt has committed."""
        return self._newest

    def save(self, steps: int, engine: Engine, points: Points, facts: Mapping[str, Any]) -> None:
        """Takes the state after ``steps`` steps, once the save before is over. All ranks call it together.

        Args:
            points: of the curves since the save before; rank 0 has them.
            facts: for the manifest.

        Raises:
            As ``wait``, of the save before.
        """
        self.wait()
        self._unsaved += points
        state = engine.named_state(owned=True, live=True)
        self._snapshot.take((f"{kind}/{name}", value) for name, kinds in state for kind, value in kinds.items())
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
            self._thread.start()
        self._over.clear()
        self._jobs.put((steps, list(self._unsaved), dict(facts)))

    def wait(self, must: bool = False) -> bool:
        """Until the last save is over; whether it succeeded, as far as this rank has heard.

        Args:
            must: it must have succeeded: what follows relies on it.

        Raises:
            NotSavedError: it must have, and has not.
            DivergedError: its state was not finite on some rank; it was not committed.
            LeaseLostError: the run has another driver.
        """
        self._over.wait()
        if self._error is not None:
            raise self._error
        if must and self._failure is not None:
            raise NotSavedError(
                f"{self._failure}; see to the storage and give the same command again: it goes on from the newest "
                f"checkpoint there, {f'of step {self._newest}' if self._newest else 'if there is one'}"
            )
        return self._failure is None

    def _work(self) -> None:
        """The thread."""
        while True:
            self._save(*self._jobs.get())
            self._over.set()

    def _save(self, steps: int, points: Points, facts: dict[str, Any]) -> None:
        try:
            word = self._written(name_of(steps, self._token), steps, points, facts)
        except BaseException as error:  # raised again by wait, on the training thread
            self._error = error
            return
        if "diverged" in word:
            self._error = DivergedError(word["diverged"], steps)
        elif "failed" in word:
            self._failure = f"{self._folder.url}: the checkpoint of step {steps} was not saved: {word['failed']}"
            if self._rank == 0:
                logger.warning("%s; training goes on, its curve goes with the next one", self._failure)
        else:
            self._failure, self._newest, self._unsaved = None, steps, []

    def _written(self, name: str, steps: int, points: Points, facts: dict[str, Any]) -> Word:
        """Writes this rank's part and sees to the others; how it all went."""
        mine = self._part(name, steps)
        if self._rank == 0:
            try:
                word = self._commit(name, mine, points, facts)
            except BaseException:
                self._tell(name, {"failed": "rank 0 had to stop"})
                raise
            self._tell(name, word)
            return word
        try:
            self._post(name, mine)
            word = self._awaited(name, 0, 2 * PART_SECONDS)  # rank 0 may have waited as long for another
            self._heard(name, 1)
        except OSError as error:
            word = {"failed": f"rank {self._rank}: {error}"}
        return mine if "diverged" in mine else word

    def _part(self, name: str, steps: int) -> Word:
        """Writes this rank's part; its digest, or what went wrong."""
        self._snapshot.settle()
        bad = self._snapshot.not_finite()
        if bad is not None:  # the loss of a step cannot tell what its own update did
            return {"diverged": f"{bad} is not finite after step {steps}"}
        content = self._snapshot.content
        try:
            self._folder.write(f"{name}/{part_of(self._rank)}", content)
        except OSError as error:
            return {"failed": f"rank {self._rank}: {error}"}
        return {"sha256": hashlib.sha256(content).hexdigest()}

    def _commit(self, name: str, mine: Word, points: Points, facts: dict[str, Any]) -> Word:
        """Rank 0: writes what is left when all parts are there; or removes them."""
        curve = to_json(points)
        try:
            words = [mine, *(self._awaited(name, rank, PART_SECONDS) for rank in range(1, self._world))]
            word = next((w for w in words if "diverged" in w), None) or next((w for w in words if "failed" in w), None)
            if word is None:
                self._folder.write(f"{name}/{CURVE}", curve)
                files = {CURVE: hashlib.sha256(curve).hexdigest()}
                files |= {part_of(rank): word["sha256"] for rank, word in enumerate(words)}
                self._allowed()
                self._folder.write(f"{name}/{MANIFEST}", to_json({**facts, "files": files}))
                return {}
        except OSError as error:
            word = {"failed": f"rank 0: {error}"}
        with contextlib.suppress(OSError):  # what cannot be removed either is no checkpoint, and pruned later
            discard(self._folder, name)
        return word

    # --- the board ---------------------------------------------------------------------------------------------

    def _tell(self, name: str, word: Word) -> None:
        """Rank 0's word to the others; until they have heard it, since the board may end with this process."""
        if self._world == 1:
            return
        with contextlib.suppress(OSError):  # who has not heard it in time is gone
            self._post(name, word)
            deadline = time.monotonic() + HEARD_SECONDS
            while self._heard(name, 0) < self._world - 1 and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)

    def _heard(self, name: str, more: int) -> int:
        with _as_storage():
            return int(self._shared.add(f"{name}/heard", more))

    def _post(self, name: str, word: Word) -> None:
        with _as_storage():
            self._shared.set(f"{name}/{self._rank}", json.dumps(word))

    def _awaited(self, name: str, rank: int, seconds: float) -> Word:
        """What a rank says of a save: rank 0 how it ended, another how its part went.

        It never blocks on the board: the training thread shares its connection.

        Raises:
            OSError: nothing in time, or the board is gone.
        """
        key, deadline = f"{name}/{rank}", time.monotonic() + seconds
        with _as_storage():
            while not self._shared.check([key]):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nothing from rank {rank} in {seconds:.0f} s")
                time.sleep(LOOK_SECONDS)
            word: Word = json.loads(self._shared.get(key))
        return word

    @property
    def _shared(self) -> Store:
        assert self._board is not None  # the constructor has seen to it
        return self._board


@contextlib.contextmanager
def _as_storage() -> Iterator[None]:
    """A board that is gone is like storage that does not answer."""
    try:
        yield
    except DistError as error:
        raise ConnectionError(str(error)) from error
