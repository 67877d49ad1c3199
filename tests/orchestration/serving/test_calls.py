"""Requests go together while others are on their way, and survive who dies under them."""

import asyncio
from collections.abc import Callable

import pytest

from orchestration.serving.answers import JSON, Answer, Work
from orchestration.serving.app import UnavailableError
from orchestration.serving.calls import MOST_BYTES, TRIES, Calls, LostError


class Replicas:
    """Answer each request with its own body; `calls` has the bodies of each call."""

    def __init__(self, dies: Callable[[list[bytes]], bool] = lambda bodies: False) -> None:
        self.calls: list[list[bytes]] = []
        self.now = self.most = 0
        self._dies = dies

    async def __call__(self, works: list[Work]) -> list[Answer]:
        bodies = [work.body for work in works]
        self.calls.append(bodies)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        self.now -= 1
        if self._dies(bodies):
            raise LostError("a replica died")
        if b"wrong" in bodies:
            raise RuntimeError("the model failed")
        return [Answer(200, "text/plain", body) for body in bodies]


def work(number: int, media: str = "image/png") -> Work:
    return Work(media, str(number).encode())


async def asked(calls: Calls, works: list[Work]) -> list[Answer | BaseException]:
    return await asyncio.gather(*(calls.answer(work) for work in works), return_exceptions=True)


def test_everybody_gets_the_answer_to_what_they_asked() -> None:
    replicas = Replicas()
    calls = Calls(replicas, batch=8, at_once=3)
    answers = asyncio.run(asked(calls, [work(number) for number in range(100)]))
    assert [answer.body for answer in answers if isinstance(answer, Answer)] == [
        b"%d" % number for number in range(100)
    ]
    assert replicas.most == 3 and max(map(len, replicas.calls)) == 8
    assert len(replicas.calls) <= 100 / 8 + 2 * 3  # together, though each was asked alone


def test_requests_of_several_images_go_alone() -> None:
    replicas = Replicas()
    works = [work(number, JSON if number % 5 == 0 else "image/png") for number in range(30)]
    answers = asyncio.run(asked(Calls(replicas, batch=8, at_once=1), works))
    assert all(isinstance(answer, Answer) for answer in answers)
    several = {b"%d" % number for number in range(0, 30, 5)}
    assert all(len(bodies) == 1 for bodies in replicas.calls if several & set(bodies))


def test_large_requests_do_not_pile_up_in_one_call() -> None:
    replicas = Replicas()
    works = [Work("image/png", bytes(MOST_BYTES // 3 if number % 2 else 2 * MOST_BYTES)) for number in range(20)]
    assert all(isinstance(answer, Answer) for answer in asyncio.run(asked(Calls(replicas, batch=8, at_once=1), works)))
    assert all(sum(map(len, bodies)) <= MOST_BYTES or len(bodies) == 1 for bodies in replicas.calls)


def test_a_death_is_survived() -> None:
    deaths = iter([True, False, True, *[False] * 100])
    replicas = Replicas(lambda bodies: next(deaths))
    answers = asyncio.run(asked(Calls(replicas, batch=8, at_once=2), [work(number) for number in range(40)]))
    assert [answer.body for answer in answers if isinstance(answer, Answer)] == [b"%d" % number for number in range(40)]


def test_what_kills_replicas_takes_nobody_with_it() -> None:
    replicas = Replicas(lambda bodies: b"13" in bodies)
    answers = asyncio.run(asked(Calls(replicas, batch=8, at_once=2), [work(number) for number in range(40)]))
    failed = [number for number, answer in enumerate(answers) if not isinstance(answer, Answer)]
    assert failed == [13] and isinstance(answers[13], UnavailableError)
    assert sum(b"13" in bodies for bodies in replicas.calls) == TRIES


def test_an_error_is_told_to_who_asked_and_the_others_go_on() -> None:
    async def both() -> None:
        calls = Calls(Replicas(), batch=1, at_once=1)
        wrong, right = await asked(calls, [Work("image/png", b"wrong"), work(1)])
        assert isinstance(wrong, RuntimeError) and isinstance(right, Answer)
        assert (await calls.answer(work(2))).body == b"2"

    asyncio.run(both())


def test_who_has_gone_is_not_answered_for() -> None:
    async def leave() -> list[list[bytes]]:
        replicas = Replicas()
        calls = Calls(replicas, batch=1, at_once=1)
        staying = asyncio.create_task(calls.answer(work(0)))
        leaving = asyncio.create_task(calls.answer(work(1)))
        await asyncio.sleep(0.005)
        leaving.cancel()
        await staying
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await asyncio.sleep(0.03)
        return replicas.calls

    assert asyncio.run(leave()) == [[b"0"]]


def test_nobody_is_forgotten_between_two_calls() -> None:
    async def call(works: list[Work]) -> list[Answer]:
        await asyncio.sleep(0)
        return [Answer(200, "text/plain", work.body) for work in works]

    async def client(calls: Calls, turns: int) -> None:
        for _ in range(turns):
            await calls.answer(work(0))

    async def crowd() -> None:
        calls = Calls(call, batch=2, at_once=1)
        async with asyncio.timeout(20):
            await asyncio.gather(*(client(calls, 50 + number) for number in range(7)))

    asyncio.run(crowd())
