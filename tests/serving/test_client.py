"""The Python client, against the real application in this process, and against answers that a service might give."""

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from bench.uploads import png
from lr_ray.errors import ConfigError, DataError, ServiceError
from lr_ray.serving.api import Service, make_app
from lr_ray.serving.client import Client
from lr_ray.serving.keys import Keyring, add_key

CLASSES = {'dark "1"/☃': [png(0), png(1)], "query": [png(i, shade=190) for i in range(2)]}
URL = "http://127.0.0.1:8000"


class InProcess(httpx.BaseTransport):
    """To the application, without a socket."""

    def __init__(self, service: Service) -> None:
        self.transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def ask() -> httpx.Response:
            response = await self.transport.handle_async_request(request)
            headers = {name: value for name, value in response.headers.items() if name != "content-length"}
            return httpx.Response(response.status_code, headers=headers, content=await response.aread())

        return asyncio.run(ask())


@pytest.fixture
def there(service: Service) -> Iterator[Client]:
    with Client(URL, transport=InProcess(service)) as client:
        yield client


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited."""
    waited: list[float] = []
    monkeypatch.setattr("lr_ray.serving.client.time.sleep", waited.append)
    return waited


def answering(*answers: httpx.Response, **options: float) -> Client:
    """A client of a service that gives these answers, then the last again and again."""
    left = list(answers)
    return Client(URL, transport=httpx.MockTransport(lambda _: left.pop(0) if len(left) > 1 else left[0]), **options)


def test_a_task_from_its_creation_to_its_end(there: Client, tmp_path: Path):
    (tmp_path / "q.png").write_bytes(png(2))
    task = there.create_task(CLASSES)
    assert (task.model, task.version, [c.name for c in task.classes]) == ("mine", 1, list(CLASSES))
    answer = there.classify(task.id, [tmp_path / "q.png", png(2, shade=190)], top=1)
    assert [(row.file, row.class_name) for row in answer.results] == [
        (str(tmp_path / "q.png"), 'dark "1"/☃'),
        ("images[1]", "query"),
    ]
    assert [len(row.ranked) for row in answer.results] == [1, 1]
    assert answer.threshold == task.threshold
    grown = there.add_images(task.id, {"grey": [png(5, shade=90)]}, version=1)
    assert (grown.version, len(grown.classes)) == (2, 3)
    with pytest.raises(ServiceError, match="has version 2 by now, not 1") as caught:
        there.add_images(task.id, {"grey": [png(5, shade=90)]}, version=1)
    assert (caught.value.status, caught.value.title) == (409, "Conflict")
    assert [c.name for c in there.remove_class(task.id, 'dark "1"/☃').classes] == ["grey", "query"]
    assert len(there.task(task.id, prototypes=True).classes[0].prototype or []) == 12
    assert [found.id for found in there.tasks()] == [task.id]
    there.delete(task.id)
    assert there.tasks() == []
    with pytest.raises(ServiceError, match="there is no such task"):
        there.task(task.id)


def test_without_a_task_and_by_another_model(there: Client):
    once = there.classify_once(CLASSES, [png(2)], temperature=0.001)
    kept = there.classify(there.create_task(CLASSES).id, [png(2)], temperature=0.001)
    assert once == kept
    other = there.embed([png(2)], model="other")
    mine = there.embed([png(2)])
    torch.testing.assert_close(torch.tensor(other.features), -torch.tensor(mine.features))
    assert torch.tensor(there.attend([png(2)]).grids).sum() == pytest.approx(1)
    assert [(m.name, m.default) for m in there.models().models] == [("mine", True), ("other", False), ("backbone", False)]
    assert there.create_task(CLASSES, model="backbone").model == "backbone"
    with pytest.raises(ServiceError, match="model 'x' is not served here"):
        there.classify_once(CLASSES, [png(2)], model="x")


def test_the_key_opens_and_is_not_shown(service: Service, tmp_path: Path):
    secret = add_key(tmp_path / "keys.json", "ann")
    service.keyring = Keyring(path=tmp_path / "keys.json")
    with Client(URL, secret, transport=InProcess(service)) as client:
        assert client.tasks() == []
        assert secret not in repr(vars(client))
    with Client(URL, transport=InProcess(service)) as stranger, pytest.raises(ServiceError, match="no valid API key") as caught:
        stranger.tasks()
    assert caught.value.status == 401
    assert caught.value.request_id
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.detail, again.status, again.title, again.request_id) == (
        caught.value.detail,
        401,
        "Unauthorized",
        caught.value.request_id,
    )


def test_the_key_may_come_with_the_end_of_its_line(service: Service, tmp_path: Path):
    secret = add_key(tmp_path / "keys.json", "ann")
    service.keyring = Keyring(path=tmp_path / "keys.json")
    with Client(URL, f" {secret}\r\n", transport=InProcess(service)) as client:
        assert client.tasks() == []


@pytest.mark.parametrize("key", ["lrray_SEC\nRET", "lrray_SEC RET", "lrray_SECRÉT", "lrray_SEC\0RET", "\n", ""])
def test_a_key_that_cannot_be_is_not_shown(key: str):
    with pytest.raises(ConfigError, match="the key has characters that no key has, or none") as caught:
        Client(URL, key)
    assert "lrray_SEC" not in str(caught.value)


def test_headers_that_cannot_be_sent_are_not_shown():
    def refuse(_request: httpx.Request) -> httpx.Response:
        raise httpx.LocalProtocolError("Illegal header value b'Bearer lrray_SECRET'")

    with pytest.raises(ServiceError, match=r"cannot be reached \(LocalProtocolError\)"):
        Client(URL, transport=httpx.MockTransport(refuse)).models()


def test_what_is_put_off_is_asked_again(waits: list[float]):
    late = httpx.Response(429, headers={"retry-after": "7"})
    busy, done = httpx.Response(503), httpx.Response(200, json={"tasks": []})
    assert answering(late, busy, busy, done).tasks() == []
    assert waits == [7, 2, 4]


@pytest.mark.parametrize(("said", "expected"), [("1", [1] * 4), (None, [1, 2, 4, 8]), ("25", [25, 25]), ("61", [])])
def test_but_not_for_ever(waits: list[float], said: str | None, expected: list[float]):
    headers = {} if said is None else {"retry-after": said}
    with pytest.raises(ServiceError, match="Service Unavailable") as caught:
        answering(httpx.Response(503, headers=headers)).models()
    assert waits == expected
    assert caught.value.status == 503


def test_a_refusal_is_not_asked_again(waits: list[float]):
    for status in (400, 404, 409, 413, 500):
        with pytest.raises(ServiceError):
            answering(httpx.Response(status)).tasks()
    assert waits == []


@pytest.mark.parametrize("name", [".", "..", ""])
def test_what_is_no_part_of_an_address_is_not_asked_for(name: str):
    """httpx would take dots out of it: to remove class `..` would delete the task."""
    client = answering(httpx.Response(204))
    with pytest.raises(ConfigError, match="names no task and no class"):
        client.remove_class("id", name)
    with pytest.raises(ConfigError, match="names no task and no class"):
        client.delete(name)


def test_what_is_no_service_is_one_line():
    with pytest.raises(ServiceError, match="something else than a service of LR-Ray; check the URL"):
        answering(httpx.Response(200, text="<html>hello</html>")).tasks()
    with pytest.raises(ServiceError, match="Bad Gateway") as caught:
        answering(httpx.Response(502, text="<html>nginx</html>", headers={"x-request-id": "r"})).tasks()
    assert (caught.value.status, caught.value.request_id) == (502, "r")

    def refuse(_request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused")

    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:8000 cannot be reached \(Connection refused\)") as caught:
        Client(URL, transport=httpx.MockTransport(refuse)).models()
    assert caught.value.status is None


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "file:///etc/passwd", "http://", "http://a:port"])
def test_what_is_no_url(url: str):
    with pytest.raises(ConfigError, match="is no URL of a service"):
        Client(url)


def test_images_that_cannot_be_sent(there: Client, tmp_path: Path):
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: there.embed([tmp_path / "none.png"]), r"none\.png: No such file"),
        (lambda: there.embed(b"x"), "images: one bytes; give a list of them"),  # type: ignore[arg-type]
        (lambda: there.classify_once({"a": "a.png"}, [png()]), "images: one str; give a list of them"),
    ]
    for call, message in calls:
        with pytest.raises(DataError, match=message):
            call()


def test_importing_it_needs_neither_torch_nor_ray():
    code = "import sys, lr_ray.serving.client; print(sorted({'torch', 'ray', 'timm', 'numpy', 'fastapi'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
