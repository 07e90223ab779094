"""Where workers wait for one another."""

import asyncio
from typing import Any

from lr_ray.runtime.session import this_node


class Barrier:
    """A Ray actor that lets so many workers on at the same moment, time after time."""

    def __init__(self, parties: int, timeout_s: float) -> None:
        self._barrier, self._timeout_s = asyncio.Barrier(parties), timeout_s

    async def wait(self) -> bool:
        """Whether all came; once somebody did not in time, or is known to be lost, never again."""
        try:
            await asyncio.wait_for(self._barrier.wait(), self._timeout_s)
        except (TimeoutError, asyncio.BrokenBarrierError):
            await self._barrier.abort()
            return False
        return True

    async def abort(self) -> None:
        """Those who wait need not: somebody is lost."""
        await self._barrier.abort()


def start_barrier(parties: int, *, timeout_s: float) -> Any:
    """A handle to a barrier beside this driver."""
    import ray

    return ray.remote(num_cpus=0, scheduling_strategy=this_node())(Barrier).remote(parties, timeout_s)
