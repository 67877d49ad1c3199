"""A cluster that is made up: Ray's client, of jobs whose logs and ends are known, and a clock that only sleep moves."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ray.job_submission import JobStatus

HANG = object()  # a connection that says nothing any more


@dataclass
class Info:
    status: JobStatus
    driver_exit_code: int | None = None
    message: str | None = None


@dataclass
class Clock:
    """Time that passes only where it is slept."""

    time: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds

    def now(self) -> float:
        return self.time


class Cluster:
    """Ray's client, of a job whose log is known: each connection gives some of it, from its beginning, and breaks."""

    def __init__(self, log: str, breaks: list[tuple[int, object]], end: Info) -> None:
        self.log, self.breaks, self.end = log, breaks, end
        self.stops = 0
        self.unreachable = False
        self.submitted: list[str] = []

    def get_job_info(self, job_id: str) -> Any:
        if self.unreachable:
            raise ConnectionError("nobody there")
        return Info(JobStatus.RUNNING) if self.breaks else self.end

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        if self.unreachable:
            raise ConnectionError("nobody there")
        upto, how = self.breaks.pop(0) if self.breaks else (len(self.log), None)
        for start in range(0, upto, 7):
            yield self.log[start : min(start + 7, upto)]
        if isinstance(how, Exception):
            raise how
        if how is HANG:
            await asyncio.sleep(3600)

    def stop_job(self, job_id: str) -> bool:
        self.stops += 1
        self.end = Info(JobStatus.STOPPED)
        return True

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str:
        self.submitted.append(entrypoint)
        return submission_id
