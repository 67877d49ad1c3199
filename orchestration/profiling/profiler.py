"""A rank's steps, part by part. What the training loop is given is wrapped; the loop itself knows nothing of it."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestration.profiling.clock import PartClock
from orchestration.profiling.collectives import watched
from orchestration.profiling.profile import PARTS, TRACED_STEPS, WARM_STEPS, StepProfile, Traffic
from orchestration.worker import Batches, Hook, Micro, StepReport


class Profiler:
    """Divides the time of one rank's steps. On a GPU each part waits until its work is done: steps take longer.

    Args:
        device: "cpu", or "cuda".
        trace: record `TRACED_STEPS` of the steps for Perfetto as well.
    """

    def __init__(self, device: str, trace: bool = False) -> None:
        settle = torch.cuda.synchronize if device == "cuda" else (lambda: None)
        self._clock = PartClock(settle=settle)
        self._stack = ExitStack()
        self._trace = _Trace(device) if trace else None
        self._done = 0
        self._since = _Sums()  # the last points
        self._all = _Sums()

    def __enter__(self) -> "Profiler":
        self._stack.enter_context(watched(self._note, lambda: self.part("communication")))
        if self._trace is not None:
            self._stack.enter_context(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        with self._clock.part(name):
            if self._trace is None:
                yield
            else:
                with torch.profiler.record_function(name):
                    yield

    def around(self, engine: Any, batches: Batches, hooks: Sequence[tuple[str, Hook]]) -> tuple[Any, Any, list[Hook]]:
        """What the training loop is given, timed; each hook with the part that it belongs to."""
        timed = [self.call(name, hook) for name, hook in hooks]
        return _Engine(engine, self), _Batches(batches, self), [*timed, self._stepped]

    def call(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a part."""

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return timed

    def points(self) -> dict[str, float]:
        """For the curves: milliseconds of each part of a step, on average since the last call."""
        profile = self._since.profile()
        self._since.clear()
        points = {f"profile/{name.replace(' ', '_')}_ms": 1e3 * value for name, value in profile.seconds.items()}
        if profile.steps:
            points["profile/sent_megabytes"] = profile.traffic.sent / profile.steps / 1e6
        return points

    def profile(self) -> StepProfile:
        """Of all steps but the first few."""
        return self._all.profile()

    def trace(self) -> bytes | None:
        """The trace, JSON compressed by gzip; None if none was wished, or the run ended before."""
        return self._trace.content if self._trace is not None else None

    def _stepped(self, report: StepReport) -> None:
        seconds, self._done = self._clock.lap(), self._done + 1
        for sums in (self._since, self._all):
            if self._done == WARM_STEPS:
                sums.clear()
            else:
                sums.add(seconds, report.batch_size)
        if self._trace is not None:
            self._trace.step()
            self._clock.lap()  # writing it down is no part of a step

    def _note(self, traffic: Traffic) -> None:
        for sums in (self._since, self._all):
            sums.traffic += traffic


class _Sums:
    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.steps, self.images = 0, 0
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.traffic = Traffic()

    def add(self, seconds: Mapping[str, float], images: int) -> None:
        self.steps += 1
        self.images += images
        for name, value in seconds.items():
            self.seconds[name] += value

    def profile(self) -> StepProfile:
        means = {name: value / self.steps for name, value in self.seconds.items()} if self.steps else {}
        return StepProfile(self.steps, means, self.traffic, self.images)


class _Engine:
    """An engine whose parts are timed."""

    def __init__(self, engine: Any, profiler: Profiler) -> None:
        self._engine, self._part = engine, profiler.part

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        with self._part("forward"):
            return self._engine(*inputs, **options)

    def backward(self, *arguments: Any) -> None:
        with self._part("backward"):
            self._engine.backward(*arguments)

    def step(self, learning_rate: float) -> None:
        with self._part("optimizer"):
            self._engine.step(learning_rate)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class _Batches:
    """Batches whose waiting and copying are timed."""

    def __init__(self, batches: Batches, profiler: Profiler) -> None:
        self._batches, self._profiler = batches, profiler

    @property
    def waited(self) -> float:
        return self._batches.waited

    def batch_size(self, step: int) -> int:
        return self._batches.batch_size(step)

    def step(self, step: int) -> Sequence[Any]:
        with self._profiler.part("data wait"):
            return [_Arriving(micro, self._profiler.part) for micro in self._batches.step(step)]


@dataclass(frozen=True)
class _Arriving:
    """A micro batch that the loop has yet to send to its device."""

    micro: Micro
    part: Callable[[str], AbstractContextManager[None]]

    def to(self, device: torch.device) -> Micro:
        with self.part("host to device"):
            return self.micro.to(device)


class _Trace:
    """Some steps as torch's profiler records them."""

    def __init__(self, device: str) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.content: bytes | None = None
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=WARM_STEPS - 1, warmup=1, active=TRACED_STEPS, repeat=1),
            on_trace_ready=self._keep,
        )

    def __enter__(self) -> None:
        self._profiler.start()

    def __exit__(self, *error: object) -> None:
        self._profiler.stop()

    def step(self) -> None:
        self._profiler.step()

    def _keep(self, profiler: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json.gz"
            profiler.export_chrome_trace(str(path))
            self.content = path.read_bytes()
