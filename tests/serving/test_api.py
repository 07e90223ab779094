"""The HTTP interface: answers, errors in one shape, owners, limits, and nothing that leaks."""

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from bench.uploads import base64_of, json_body, multipart, png, zipped
from lr_ray.errors import RequestError, StorageError
from lr_ray.serving.api import Service
from lr_ray.serving.images import Upload, decode_uploads
from lr_ray.serving.limits import Bounds
from lr_ray.serving.problems import is_loopback
from lr_ray.serving.store import TaskStore
from lr_ray.serving.tasks import Support
from tests.serving.conftest import CATALOGUE, LIMITS
from tests.serving.pictures import features_of

DARK, LIGHT, GREY = [png(i) for i in range(3)], [png(i, shade=190) for i in range(3)], [png(i, shade=90) for i in range(3)]
SUPPORT = {"dark": DARK[:2], "light": LIGHT[:2]}
QUERIES = [LIGHT[2], DARK[2], GREY[2]]


def as_json(classes: dict[str, list[bytes]], images: list[bytes] | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {"classes": {name: [base64_of(c) for c in members] for name, members in classes.items()}}
    return body if images is None else body | {"images": [base64_of(c) for c in images]}


def make(client: TestClient, classes: dict[str, list[bytes]] = SUPPORT) -> dict[str, Any]:
    answer = client.post("/v1/tasks", json=as_json(classes))
    assert answer.status_code == 201, answer.text
    return answer.json()  # type: ignore[no-any-return]


def expected(classes: dict[str, list[bytes]]) -> Support:
    uploads = [Upload(name="", content=content) for members in classes.values() for content in members]
    labels = [name for name, members in classes.items() for _ in members]
    return Support.of(features_of(decode_uploads(uploads, 16, LIMITS)), labels)


def problem(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert set(body) == {"type", "title", "status", "detail", "request_id"}
    assert body["request_id"] == answer.headers["x-request-id"]
    return str(body["detail"])


# ------------------------------------------------------------------------------------------------------------- tasks


def test_a_task_and_its_prototypes(client: TestClient):
    answer = client.post("/v1/tasks", json=as_json(SUPPORT))
    task, support = answer.json(), expected(SUPPORT)
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/tasks/{task['id']}"
    assert answer.headers["etag"] == '"1"'
    assert [(c["name"], c["images"], c["prototype"]) for c in task["classes"]] == [("dark", 2, None), ("light", 2, None)]
    assert task["threshold"] == pytest.approx(support.threshold)
    whole = client.get(answer.headers["location"], params={"prototypes": "true"}).json()
    torch.testing.assert_close(torch.tensor([c["prototype"] for c in whole["classes"]]), support.prototypes)
    assert client.get("/v1/tasks").json() == {"tasks": [task]}


def test_classify_by_a_task(client: TestClient):
    task, support = make(client), expected(SUPPORT)
    body, kind = multipart(*[("images", f"{i}.png", content) for i, content in enumerate(QUERIES)])
    answer = client.post(f"/v1/tasks/{task['id']}/classify", content=body, headers={"content-type": kind}).json()
    features = features_of(decode_uploads([Upload(name="", content=content) for content in QUERIES], 16, LIMITS))
    for index, (row, found) in enumerate(zip(answer["results"], support.classify(features), strict=True)):
        assert (row["file"], row["class"]) == (f"{index}.png", found.ranked[0])
        assert row["probability"] == pytest.approx(found.probabilities[0])
        assert row["distance"] == pytest.approx(found.distances[0], rel=1e-5)
        assert [candidate["class"] for candidate in row["ranked"]] == list(found.ranked)
    assert [row["class"] for row in answer["results"]][:2] == ["light", "dark"]
    assert [row["none_of_these"] for row in answer["results"]] == [False, False, True]
    assert answer["threshold"] == task["threshold"]


def test_one_image_as_the_body_and_what_is_asked_of_the_answer(client: TestClient):
    task = make(client)
    url = f"/v1/tasks/{task['id']}/classify"
    (row,) = client.post(url, content=GREY[2], headers={"content-type": "image/png"}, params={"top": 1}).json()["results"]
    (flat,) = client.post(url, content=GREY[2], headers={"content-type": "image/png"}, params={"temperature": 0.001}).json()[
        "results"
    ]
    assert len(row["ranked"]) == 1
    assert len(flat["ranked"]) == 2
    assert abs(flat["probability"] - 0.5) < abs(row["probability"] - 0.5)


def test_without_a_task_the_answers_are_the_same_and_nothing_is_kept(client: TestClient, tmp_path: Path):
    once = client.post("/v1/classify", json=as_json(SUPPORT, QUERIES))
    assert once.status_code == 200, once.text
    assert not (tmp_path / "tasks").exists()
    task = make(client)
    kept = client.post(f"/v1/tasks/{task['id']}/classify", json={"images": [base64_of(c) for c in QUERIES]})
    assert once.json() == kept.json()
    files = {f"support/{name}/{i}.png": c for name, members in SUPPORT.items() for i, c in enumerate(members)}
    archive = zipped(files | {f"query/{i}.png": c for i, c in enumerate(QUERIES)})
    by_zip = client.post("/v1/classify", content=archive, headers={"content-type": "application/zip"}).json()
    assert [row["distance"] for row in by_zip["results"]] == [row["distance"] for row in once.json()["results"]]


def test_embeddings(client: TestClient):
    answer = client.post("/v1/embeddings", json={"images": [base64_of(c) for c in QUERIES]}).json()
    features = features_of(decode_uploads([Upload(name="", content=content) for content in QUERIES], 16, LIMITS))
    torch.testing.assert_close(torch.tensor(answer["features"]), features)


def test_classes_and_images_are_added_and_removed(client: TestClient):
    task = make(client)
    url = f"/v1/tasks/{task['id']}"
    added = client.post(f"{url}/classes", json=as_json({"grey/50 %": GREY, "dark": DARK[2:]}))
    assert added.status_code == 200, added.text
    assert added.headers["etag"] == '"2"'
    whole = expected({"dark": DARK, "grey/50 %": GREY, "light": LIGHT[:2]})
    assert [(c["name"], c["images"]) for c in added.json()["classes"]] == [("dark", 3), ("grey/50 %", 3), ("light", 2)]
    assert added.json()["threshold"] == pytest.approx(whole.threshold)
    removed = client.delete(f"{url}/classes/grey%2F50%20%25")
    assert removed.status_code == 200, removed.text
    assert [(c["name"], c["images"]) for c in removed.json()["classes"]] == [("dark", 3), ("light", 2)]
    assert removed.json()["threshold"] == pytest.approx(expected({"dark": DARK, "light": LIGHT[:2]}).threshold)
    problem(client.delete(f"{url}/classes/grey"), 404)
    problem(client.delete(f"{url}/classes/dark"), 422)
    assert client.delete(url).status_code == 204
    for answer in (client.get(url), client.delete(url), client.post(f"{url}/classify", json={"images": []})):
        assert problem(answer, 404) == "there is no such task"


def test_a_change_is_meant_for_a_version(client: TestClient):
    task = make(client)
    url = f"/v1/tasks/{task['id']}/classes"
    for tag, status in (('"1"', 200), ('"1"', 409), ("2", 200), ("*", 200), ("x", 400), ("-1", 400), ('"9999999999"', 400)):
        answer = client.post(url, json=as_json({"grey": GREY[:1]}), headers={"if-match": tag})
        assert answer.status_code == status, (tag, answer.text)


def test_what_makes_no_task(client: TestClient, service: Service):
    assert "one class only" in problem(client.post("/v1/tasks", json=as_json({"a": DARK})), 422)
    assert "no images to classify" in problem(client.post("/v1/classify", json=as_json(SUPPORT, [])), 422)
    assert "one class only" in problem(client.post("/v1/classify", json=as_json({"a": DARK}, QUERIES)), 422)
    service.bounds = Bounds(tasks=1)
    task = make(client)
    assert "no more may be" in problem(client.post("/v1/tasks", json=as_json(SUPPORT)), 413)
    more = {str(i): DARK[:1] for i in range(5)}
    assert "7 classes" in problem(client.post(f"/v1/tasks/{task['id']}/classes", json=as_json(more)), 413)


# ------------------------------------------------------------------------------------------------------------ models


def test_the_models(client: TestClient):
    assert client.get("/v1/models").json() == {
        "models": [
            {"name": "mine", "digest": "m", "default": True},
            {"name": "other", "digest": "o", "default": False},
            {"name": "backbone", "digest": "b", "default": False},
        ],
        "image_px": 16,
        "num_features": 12,
    }


def test_every_request_goes_to_the_model_it_names(client: TestClient):
    images = {"images": [base64_of(c) for c in QUERIES]}
    features = {
        name: torch.tensor(client.post("/v1/embeddings", json=images, params=params).json()["features"])
        for name, params in (("mine", {}), ("other", {"model": "other"}), ("backbone", {"model": "backbone"}))
    }
    torch.testing.assert_close(features["other"], -features["mine"])
    torch.testing.assert_close(features["backbone"], features["mine"] / 2)
    once = [
        client.post("/v1/classify", json=as_json(SUPPORT, QUERIES), params={"model": name}).json()["results"][0]["distance"]
        for name in ("mine", "backbone")
    ]
    assert once[1] == pytest.approx(once[0] / 2, rel=1e-5)
    for url in ("/v1/tasks", "/v1/classify", "/v1/embeddings", "/v1/attention"):
        answer = client.post(url, json=images, params={"model": "none"})
        assert "model 'none' is not served here; give one of mine, other, backbone" in problem(answer, 422)


def test_a_task_stays_with_its_model(client: TestClient, service: Service, connect: Callable[..., TestClient]):
    task = client.post("/v1/tasks", json=as_json(SUPPORT), params={"model": "backbone"}).json()
    url = f"/v1/tasks/{task['id']}"
    assert task["model"] == client.get(url).json()["model"] == "backbone"
    assert client.post(f"{url}/classes", json=as_json({"grey": GREY})).json()["model"] == "backbone"
    body = {"images": [base64_of(c) for c in QUERIES]}
    kept = client.post(f"{url}/classify", json=body).json()
    once = client.post("/v1/classify", json=as_json(SUPPORT | {"grey": GREY}, QUERIES), params={"model": "backbone"}).json()
    assert kept == once
    assert make(client)["model"] == "mine"
    service.models = replace(CATALOGUE, models=CATALOGUE.models[:2])
    service.store = TaskStore(root=service.store.root, models=service.models.digests)
    assert "a model that this service does not have" in problem(connect(service).get(url), 409)
    assert [found["model"] for found in connect(service).get("/v1/tasks").json()["tasks"]] == ["mine"]


def test_attention_is_a_grid_for_each_image(client: TestClient):
    body, kind = multipart(*[("images", f"{i}.png", content) for i, content in enumerate(QUERIES)])
    answer = client.post("/v1/attention", content=body, headers={"content-type": kind}).json()
    grids = torch.tensor(answer["grids"])
    assert answer["files"] == ["0.png", "1.png", "2.png"]
    assert grids.shape == (3, 2, 2)
    torch.testing.assert_close(grids.sum(dim=(1, 2)), torch.ones(3))
    flat = client.post("/v1/attention", content=DARK[0], headers={"content-type": "image/png"}, params={"model": "other"})
    assert flat.json()["grids"] == [[[0.25, 0.25], [0.25, 0.25]]]


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/tasks/..%2f..%2fetc", 404),
        ("GET", "/v1/tasks/%00", 404),
        ("GET", "/v1/tasks/" + "a" * 30, 404),
        ("PUT", "/v1/tasks", 405),
        ("DELETE", "/v1/tasks", 405),
        ("POST", "/v1/tasks/x/classify?temperature=0", 422),
        ("POST", "/v1/tasks/x/classify?temperature=nan", 422),
        ("POST", "/v1/tasks/x/classify?temperature=inf", 422),
        ("POST", "/v1/tasks/x/classify?top=many", 422),
        ("POST", "/v1/tasks/x/classify", 404),
        ("POST", "/v1/tasks/x/classes", 404),
        ("DELETE", "/v1/tasks/x/classes/a", 404),
    ],
)
def test_errors_have_one_shape(client: TestClient, method: str, path: str, status: int):
    problem(client.request(method, path), status)


def test_request_ids_go_in_and_out(client: TestClient):
    assert client.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for given in ("a b", "x" * 65, "a\tb", ""):
        assert re.fullmatch("[0-9a-f]{32}", client.get("/healthz", headers={"x-request-id": given}).headers["x-request-id"])


def test_a_fault_of_ours_is_a_bare_500(service: Service, connect: Callable[..., TestClient], caplog: pytest.LogCaptureFixture):
    async def fail(_pixels: Tensor, _model: str) -> Tensor:
        raise KeyError("/secret/path")

    service.embed = fail
    answer = connect(service).post("/v1/tasks", json=as_json(SUPPORT), headers={"x-request-id": "r7"})
    assert "secret" not in problem(answer, 500)
    assert "r7" in caplog.text
    assert "/secret/path" in caplog.text


def test_a_store_that_fails_is_a_503_without_its_address(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch):
    def fail(*_args: object) -> None:
        raise StorageError("cannot list s3://bucket/secret")

    monkeypatch.setattr("lr_ray.serving.store.list_sizes", fail)
    answer = client.get("/v1/tasks")
    assert "bucket" not in problem(answer, 503)
    assert answer.headers["retry-after"] == "5"


def test_health_and_readiness(service: Service, client: TestClient):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_not_ready(service: Service, client: TestClient):
    async def fail(_pixels: Tensor, _model: str) -> Tensor:
        raise RequestError("the backbone does not answer; come again", 503, 5)

    service.embed = fail
    answer = client.get("/readyz")
    problem(answer, 503)
    assert answer.headers["retry-after"] == "5"
    assert client.get("/healthz").status_code == 200


def test_the_document_describes_every_route(client: TestClient):
    document = client.get("/openapi.json").json()
    assert {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods} == {
        "GET /healthz",
        "GET /readyz",
        "GET /metrics",
        "POST /v1/tasks",
        "GET /v1/tasks",
        "GET /v1/tasks/{task_id}",
        "DELETE /v1/tasks/{task_id}",
        "POST /v1/tasks/{task_id}/classes",
        "DELETE /v1/tasks/{task_id}/classes/{name}",
        "POST /v1/tasks/{task_id}/classify",
        "POST /v1/classify",
        "POST /v1/embeddings",
        "POST /v1/attention",
        "GET /v1/models",
    }
    body = document["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json", "application/zip"}
    assert "application/problem+json" in document["paths"]["/v1/tasks"]["get"]["responses"]["4XX"]["content"]


# ------------------------------------------------------------------------------------------------- who may ask, how much


def test_without_a_key_nothing_is_answered_but_health(keyed: Callable[..., TestClient]):
    ann = keyed("ann")
    assert ann.get("/v1/tasks").status_code == 200
    for header in (None, "Bearer x", "Basic eDp5", "Bearer", "bearer  ", ann.headers["authorization"][:-1]):
        ann.headers["authorization"] = header or ""
        for call in (ann.get("/v1/tasks"), ann.post("/v1/embeddings", content=b"x" * 500_000)):
            assert "no valid API key" in problem(call, 401)
            assert call.headers["www-authenticate"] == "Bearer"
    assert ann.get("/healthz").status_code == 200
    assert ann.get("/readyz").status_code == 200


def test_keys_do_not_see_each_others_tasks(keyed: Callable[..., TestClient]):
    ann, bob = keyed("ann"), keyed("bob")
    task = make(ann)
    url = f"/v1/tasks/{task['id']}"
    assert bob.get("/v1/tasks").json() == {"tasks": []}
    never = f"/v1/tasks/{task['id'][:-1]}{'A' if task['id'][-1] != 'A' else 'B'}"
    for there in (url, never):
        for answer in (
            bob.get(there),
            bob.delete(there),
            bob.delete(f"{there}/classes/dark"),
            bob.post(f"{there}/classes", json=as_json(SUPPORT)),
            bob.post(f"{there}/classify", json={"images": [base64_of(DARK[0])]}),
        ):
            assert problem(answer, 404) == "there is no such task"
    assert ann.get(url).json() == task


def test_a_key_asks_so_much_a_minute(keyed: Callable[..., TestClient]):
    ann, bob = keyed("ann", requests_per_minute=3), keyed("bob", bytes_per_minute=10_000, tasks=1)
    assert [ann.get("/v1/tasks").status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    answer = ann.get("/v1/tasks")
    assert "3 requests a minute" in problem(answer, 429)
    assert 1 <= int(answer.headers["retry-after"]) <= 20
    small = json_body({"images": [base64_of(png())]})
    codes = [bob.post("/v1/embeddings", content=small[0], headers={"content-type": small[1]}).status_code for _ in range(3)]
    assert (codes[0], codes[-1]) == (200, 429)
    assert len(small[0]) * 3 > 10_000 > len(small[0])


def test_a_key_keeps_so_many_tasks(keyed: Callable[..., TestClient]):
    ann = keyed("ann", tasks=1)
    make(ann)
    problem(ann.post("/v1/tasks", json=as_json(SUPPORT)), 413)


def test_keys_are_not_logged(keyed: Callable[..., TestClient], service: Service, caplog: pytest.LogCaptureFixture):
    async def fail(_pixels: Tensor, _model: str) -> Tensor:
        raise KeyError("x")

    ann = keyed("ann")
    service.embed = fail
    with caplog.at_level(logging.DEBUG):
        problem(ann.post("/v1/tasks", json=as_json(SUPPORT)), 500)
        ann.headers["authorization"] += "x"
        problem(ann.get("/v1/tasks"), 401)
    assert "lrray_" not in caplog.text


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8000"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "10.0.0.1"},
        {"host": ""},
        {"host": "["},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ""},
    ],
)
def test_without_keys_no_other_site_is_answered(client: TestClient, headers: dict[str, str]):
    problem(client.post("/v1/tasks", json=as_json(SUPPORT), headers=headers), 403)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "127.9.9.9"])
def test_without_keys_this_machine_is(client: TestClient, host: str):
    assert client.get("/v1/tasks", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


def test_with_keys_any_name_is(keyed: Callable[..., TestClient]):
    assert keyed("ann").get("/v1/tasks", headers={"host": "service.example"}).status_code == 200


def test_no_other_site_may_read(client: TestClient):
    answer = client.options("/v1/tasks", headers={"origin": "http://127.0.0.1", "access-control-request-method": "POST"})
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("host", "here"), [("::1", True), ("127.1.2.3", True), ("localhost", True), ("0.0.0.0", False)])
def test_what_is_this_machine(host: str, here: bool):
    assert is_loopback(host) is here


@pytest.mark.parametrize("host", ["::", "10.0.0.1", "example.org", "", "localhost.example", "127.0.0.1.nip.io"])
def test_what_is_not(host: str):
    assert not is_loopback(host)


def test_thresholds_are_worked_out_once_and_off_the_event_loop(client: TestClient, monkeypatch: pytest.MonkeyPatch):
    found: list[threading.Thread] = []
    cdist = torch.cdist

    def noted(*arguments: Any, **options: Any) -> Tensor:
        found.append(threading.current_thread())
        return cdist(*arguments, **options)

    monkeypatch.setattr(torch, "cdist", noted)
    task = client.post("/v1/tasks", json=as_json(SUPPORT)).json()
    for _ in range(3):
        assert client.get("/v1/tasks").json()["tasks"] == [task]
        assert client.get(f"/v1/tasks/{task['id']}").json() == task
    assert len(found) == 2  # as it was made, and as it was read
    assert all(thread.name.startswith("asyncio_") for thread in found)


def test_the_description_says_how_to_authenticate(client: TestClient, keyed: Callable[..., TestClient]):
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]
    ann = keyed("ann")
    told = ann.get("/openapi.json").json()
    assert told["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert told["paths"]["/v1/tasks"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in told["paths"]["/healthz"]["get"]
    refused = ann.get("/v1/tasks", headers={"authorization": "Basic x"})
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
