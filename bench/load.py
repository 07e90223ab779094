"""HTTP load on a service: as many requests at once as given, or so many a second whatever the answers take."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

_TIMEOUT = aiohttp.ClientTimeout(total=60)
_SAID = 200
"""Characters of the first answer that is no success."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """One request's.

    Attributes:
        content: as it travels.
        content_type: of it.
        images: in it.
    """

    content: bytes
    content_type: str
    images: int


@dataclass(kw_only=True)
class Answers:
    """What came back.

    Attributes:
        seconds: from the moment that each request was due to its last byte, of those that succeeded.
        images: in those.
        failed: how many of each status or kind of error.
        first_failure: what the first of them said.
        took_s: all together.
        cpu_s: of the processor, of this process, which makes the load.
    """

    seconds: list[float] = field(default_factory=list)
    images: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    first_failure: str = ""
    took_s: float = 0.0
    cpu_s: float = 0.0

    def quantile(self, share: float) -> float:
        """Seconds that this share of the requests took at most; nan of none."""
        return float(np.quantile(self.seconds, share)) if self.seconds else float("nan")

    @property
    def images_per_s(self) -> float:
        return self.images / self.took_s

    @property
    def load_share(self) -> float:
        """Of one processor, that the load itself took."""
        return self.cpu_s / self.took_s


def at_once(url: str, bodies: Sequence[Body], headers: Mapping[str, str], *, clients: int, duration_s: float) -> Answers:
    """Each client sends the next request when its last one is answered, for so long."""

    async def run(session: aiohttp.ClientSession, answers: Answers) -> None:
        end, turns = time.perf_counter() + duration_s, itertools.cycle(bodies)

        async def client() -> None:
            while (due := time.perf_counter()) < end:
                await _send(session, url, next(turns), due, answers)

        await asyncio.gather(*(client() for _ in range(clients)))

    return asyncio.run(_measured(run, headers))


def at_rate(
    url: str, bodies: Sequence[Body], headers: Mapping[str, str], *, per_s: float, duration_s: float, evenly: bool = False
) -> Answers:
    """So many requests a second, however long the answers take: at random moments (Poisson), or evenly."""
    count = max(1, round(per_s * duration_s))
    gaps = np.full(count, 1 / per_s) if evenly else np.random.default_rng(0).exponential(1 / per_s, count)

    async def run(session: aiohttp.ClientSession, answers: Answers) -> None:
        start, turns, sent = time.perf_counter(), itertools.cycle(bodies), []
        for moment in start + np.cumsum(gaps):
            await asyncio.sleep(max(0.0, moment - time.perf_counter()))
            sent.append(asyncio.create_task(_send(session, url, next(turns), float(moment), answers)))
        await asyncio.gather(*sent)

    return asyncio.run(_measured(run, headers))


Run = Callable[[aiohttp.ClientSession, Answers], Awaitable[None]]


async def _measured(run: Run, headers: Mapping[str, str]) -> Answers:
    answers, start, cpu = Answers(), time.perf_counter(), time.process_time()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=dict(headers), timeout=_TIMEOUT, connector=connector) as session:
        await run(session, answers)
    answers.took_s, answers.cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return answers


async def _send(session: aiohttp.ClientSession, url: str, body: Body, due: float, answers: Answers) -> None:
    failure, said = "", ""
    try:
        async with session.post(url, data=body.content, headers={"Content-Type": body.content_type}) as answer:
            content = await answer.read()
            if answer.status // 100 != 2:
                failure, said = str(answer.status), content[:_SAID].decode(errors="replace")
    except (aiohttp.ClientError, TimeoutError) as error:
        failure, said = type(error).__name__, str(error)
    if failure:
        answers.failed[failure] += 1
        answers.first_failure = answers.first_failure or f"{failure}: {said}"
    else:
        answers.seconds.append(time.perf_counter() - due)
        answers.images += body.images
