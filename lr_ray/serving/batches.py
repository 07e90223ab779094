"""Work that is cheaper together: what waits when the work before it is done is done in one go."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Nothing waits for company: what comes while nothing is done is begun at once, and what comes meanwhile is next.

    Ray Serve's own batches are made as requests come and queue up one after the other; under clients that each wait for
    their answer they hold one request each.
    """

    def __init__(
        self, work: Callable[[list[Item]], Awaitable[list[Result]]], *, size: Callable[[Item], int], most: int
    ) -> None:
        """
        Args:
            work: items → a result for each, in their order.
            size: of an item.
            most: of the sizes of what is done together, unless a single item is larger.
        """
        self._work, self._size, self._most = work, size, most
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def ask(self, item: Item) -> Result:
        """The result of an item; raises what the work raises."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, result))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await result

    async def _run(self) -> None:
        while together := self._take():
            try:
                found = await self._work([item for item, _ in together])
            except Exception as error:  # handed to those who asked
                for _, result in together:
                    if not result.done():
                        result.set_exception(error)
            else:
                for (_, result), value in zip(together, found, strict=True):
                    if not result.done():
                        result.set_result(value)

    def _take(self) -> list[tuple[Item, "asyncio.Future[Result]"]]:
        """The next to be done together; none of those who have given up."""
        together: list[tuple[Item, asyncio.Future[Result]]] = []
        size = 0
        while self._waiting:
            item, result = self._waiting[0]
            if not result.done():
                size += self._size(item)
                if together and size > self._most:
                    break
                together.append((item, result))
            self._waiting.popleft()
        return together
