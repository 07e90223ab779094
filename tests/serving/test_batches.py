"""Batches: what waits meanwhile is done together, within bounds; errors and those who give up."""

import asyncio

import pytest

from lr_ray.serving.batches import Batcher


class Recorder:
    """Work that goes on until it is let go, and fails on a negative item."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.go = asyncio.Event()

    async def work(self, items: list[int]) -> list[int]:
        self.calls.append(items)
        await self.go.wait()
        if min(items) < 0:
            raise ValueError(f"negative among {items}")
        return [item * 10 for item in items]


async def asked(recorder: Recorder, items: list[int], *, most: int = 8) -> list[int | BaseException]:
    """The first by itself, all others while it is worked on."""
    batcher = Batcher(recorder.work, size=abs, most=most)
    first = asyncio.create_task(batcher.ask(items[0]))
    while not recorder.calls:
        await asyncio.sleep(0)
    others = [asyncio.create_task(batcher.ask(item)) for item in items[1:]]
    await asyncio.sleep(0)
    recorder.go.set()
    return await asyncio.gather(first, *others, return_exceptions=True)


def test_what_waits_is_done_together_within_the_bound() -> None:
    async def run() -> None:
        recorder = Recorder()
        assert await asked(recorder, [1, 2, 3, 3, 20, 1]) == [10, 20, 30, 30, 200, 10]
        assert recorder.calls == [[1], [2, 3, 3], [20], [1]]

    asyncio.run(run())


def test_those_who_share_a_failure_hear_of_it_and_the_next_do_not() -> None:
    async def run() -> None:
        recorder = Recorder()
        found = await asked(recorder, [1, -2, 3, 7])
        assert [found[0], found[3]] == [10, 70]
        assert all(isinstance(error, ValueError) for error in found[1:3])

    asyncio.run(run())


def test_one_who_gives_up_is_left_out() -> None:
    async def run() -> None:
        recorder = Recorder()
        batcher = Batcher(recorder.work, size=abs, most=8)
        first, second, third = (asyncio.create_task(batcher.ask(item)) for item in (8, 2, 3))
        while not recorder.calls:
            await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        recorder.go.set()
        assert await asyncio.gather(first, third) == [80, 30]
        assert recorder.calls == [[8], [3]]
        with pytest.raises(asyncio.CancelledError):
            await second
        assert await batcher.ask(4) == 40

    asyncio.run(run())
