"""The gate: so many at once, so many in line, problem+json for the others; and at the end those under way are finished."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import httpx
import pytest
from starlette.testclient import TestClient
from torch import Tensor

from bench.uploads import png
from lr_ray.errors import RequestError
from lr_ray.serving.admission import Gate
from lr_ray.serving.api import Service, make_app
from tests.serving.pictures import features_of


async def turns(count: int = 20) -> None:
    """Let everything that can go on do so."""
    for _ in range(count):
        await asyncio.sleep(0)


async def enter(gate: Gate, entered: list[int], index: int, leave: asyncio.Event) -> None:
    async with gate.passage():
        entered.append(index)
        await leave.wait()


def test_so_many_at_once_then_in_line_then_none():
    async def scene() -> None:
        gate, entered, leave = Gate(at_once=2, in_line=1), [], [asyncio.Event() for _ in range(4)]
        tasks = [asyncio.create_task(enter(gate, entered, index, leave[index])) for index in range(4)]
        await turns()
        assert (entered, gate.under_way, gate.waiting) == ([0, 1], 2, 1)
        with pytest.raises(RequestError, match="2 requests are worked on and 1 wait; come again") as caught:
            await tasks[3]
        assert (caught.value.status, caught.value.retry_after_s) == (503, 1)
        leave[1].set()
        await turns()
        assert (entered, gate.under_way, gate.waiting) == ([0, 1, 2], 2, 0)
        leave[0].set()
        leave[2].set()
        await asyncio.gather(*tasks[:3])
        assert (gate.under_way, gate.waiting) == (0, 0)

    asyncio.run(scene())


def test_nobody_waits_for_ever_and_who_leaves_frees_the_line():
    async def scene() -> None:
        gate, entered, leave = Gate(at_once=1, in_line=1, wait_s=0.05), [], asyncio.Event()
        first = asyncio.create_task(enter(gate, entered, 0, leave))
        await turns()
        with pytest.raises(RequestError, match="come again") as caught:
            await enter(gate, entered, 1, leave)
        assert (caught.value.status, gate.waiting) == (503, 0)
        gate.wait_s = 60
        gone = asyncio.create_task(enter(gate, entered, 2, leave))
        await turns()
        gone.cancel()
        await turns()
        assert gate.waiting == 0
        leave.set()
        await first
        await asyncio.wait_for(enter(gate, entered, 3, leave), 5)
        assert entered == [0, 3]

    asyncio.run(scene())


def test_a_drain_refuses_new_requests_and_waits_for_the_others():
    async def scene() -> None:
        gate, entered, leave = Gate(at_once=1, in_line=1), [], asyncio.Event()
        tasks = [asyncio.create_task(enter(gate, entered, index, leave)) for index in range(2)]
        await turns()
        assert not await gate.drain(0.01)
        with pytest.raises(RequestError, match="about to end"):
            await enter(gate, entered, 2, leave)
        draining = asyncio.create_task(gate.drain(60))
        leave.set()
        assert await draining
        assert entered == [0, 1]
        await asyncio.gather(*tasks)

    asyncio.run(scene())


def test_over_http_the_others_are_problems_and_health_always_answers(service: Service):
    service.gate = Gate(at_once=1, in_line=0)
    embedding, go_on = asyncio.Event(), asyncio.Event()

    async def embed(pixels: Tensor, _model: str) -> Tensor:
        embedding.set()
        await go_on.wait()
        return features_of(pixels)

    async def scene() -> None:
        service.embed = embed
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:

            async def post() -> httpx.Response:
                return await client.post("/v1/embeddings", content=png(), headers={"content-type": "image/png"})

            first = asyncio.create_task(post())
            await embedding.wait()
            refused = await post()
            assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["request_id"] == refused.headers["x-request-id"]
            for path in ("/healthz", "/metrics"):
                assert (await client.get(path)).status_code == 200
            drained = asyncio.create_task(service.gate.drain(60))
            await turns()
            late = await post()
            assert (late.status_code, late.headers["connection"]) == (503, "close")
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            go_on.set()
            assert (await first).status_code == 200
            assert await drained

    asyncio.run(scene())


def test_what_is_refused_frees_its_place(service: Service, connect: Callable[..., TestClient]):
    service.gate = Gate(at_once=1, in_line=0)
    client = connect(service)
    for _ in range(3):
        assert client.post("/v1/tasks", content=b"", headers={"content-type": "x"}).status_code == 415
    assert service.gate.under_way == 0


def test_a_body_that_does_not_come_frees_its_place(service: Service):
    service.gate, service.limits = Gate(at_once=1, in_line=0), replace(service.limits, body_s=0.05)
    never = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield png()[:10]
        await never.wait()

    async def scene() -> None:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            found = await client.post("/v1/embeddings", content=stalled(), headers={"content-type": "image/png"})
            assert (found.status_code, found.headers["connection"]) == (408, "close")
            assert found.json()["detail"] == "the body did not come in 0.05 s; send less at once"
            assert service.gate.under_way == 0
            assert (await client.get("/v1/models")).status_code == 200

    asyncio.run(scene())


def test_what_headers_tell_against_does_not_reach_the_gate(service: Service, keyed: Callable[..., TestClient]):
    service.gate = Gate(at_once=0, in_line=0)
    ann = keyed("ann", requests_per_minute=1)
    body = {"content": b"", "headers": {"content-length": "400001", "content-type": "image/png"}}
    for _ in range(2):  # and costs nothing
        assert ann.post("/v1/embeddings", **body).status_code == 413
    refused = ann.post("/v1/embeddings", **(body | {"headers": body["headers"] | {"authorization": "Bearer x"}}))
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert ann.get("/v1/models").status_code == 503
    service.gate.at_once = 1
    assert [ann.get("/v1/models").status_code for _ in range(2)] == [200, 429]
