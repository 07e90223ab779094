"""`lr-ray push` against a stand-in of the hub that answers the requests which its client makes, and keeps what arrives."""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from lr_ray.cli.main import app
from typer.testing import CliRunner

import lr_ray
from lr_ray.errors import ExportError
from lr_ray.export.push import push_meta_lora
from lr_ray.export.write import export_model
from lr_ray.storage.adapters import read_adapter
from lr_ray.vit.tokens import encode_pixels

TOKEN = "hf_a-secret-of-the-test"
FOLDER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "metric.safetensors"}


class Hub(ThreadingHTTPServer):
    """Repositories by name, their commits, and the answers to give instead.

    Attributes:
        refuse: {part of a path: status}.
        requests: (method, path, token) in the order of arrival.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: list[dict[str, bytes]] = []
        self.blobs: dict[str, bytes] = {}
        self.refuse: dict[str, int] = {}
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_args: object) -> None:
        pass

    def answer(self, status: int, body: object = None) -> None:
        content = json.dumps({} if body is None else body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def take(self) -> bytes | None:
        """The body, unless the request is refused."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        for part, status in self.server.refuse.items():
            if part in self.path:
                self.answer(status, {"error": "refused"})
                return None
        return content

    def do_GET(self) -> None:
        if self.take() is None:
            return
        name = self.path.removeprefix("/api/models/")
        repo = self.server.repos.get(name)
        self.answer(404) if repo is None else self.answer(200, {"id": name, "siblings": [], **repo})

    def do_PUT(self) -> None:
        content = self.take()
        if content is not None:
            self.server.blobs[self.path.removeprefix("/blobs/")] = content
            self.answer(200)

    def do_POST(self) -> None:
        content = self.take()
        if content is None:
            return
        if self.path == "/api/repos/create":
            self.create(json.loads(content))
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(content)["files"]
            modes = [{**file, "shouldIgnore": False, "uploadMode": self.mode(file["path"])} for file in files]
            self.answer(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.server.url}/blobs/{item['oid']}"}}}
                for item in json.loads(content)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in content.splitlines()])
        else:
            self.answer(404)

    @staticmethod
    def mode(name: str) -> str:
        return "lfs" if name.endswith(".safetensors") else "regular"

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        there = name in self.server.repos
        self.server.repos.setdefault(name, {"private": private})
        self.answer(409 if there else 200, {"url": f"{self.server.url}/{name}"})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            files[value["path"]] = self.server.blobs[value["oid"]]
        self.server.commits.append(files)
        self.answer(200, {"commitUrl": f"{self.server.url}/me/x/commit/{'a' * 40}", "commitOid": "a" * 40})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of `huggingface_hub` in this process, reached with a token, by LFS rather than Xet."""
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def line_of(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        push_meta_lora(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


@pytest.mark.parametrize("kind", ["peft", "peft-hf"])
def test_what_arrives_is_what_export_writes(hub: Hub, meta_lora: str, tmp_path: Path, kind: str):
    command = ["push", meta_lora, "me/few-shot", "--format", kind, "--json"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    export_model(meta_lora, kind, str(tmp_path / "out"))
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    written["README.md"] = written["README.md"].replace(b'"PATH"', b'"me/few-shot"')
    assert hub.commits == [written]
    assert written.keys() == FOLDER
    printed = json.loads(done.stdout)
    assert printed["files"] == {name: len(content) for name, content in written.items()}
    assert (printed["url"], printed["commit"]) == (f"{hub.url}/me/few-shot", "a" * 40)
    assert TOKEN not in done.output
    assert hub.repos == {"me/few-shot": {"private": False}}
    writing = [
        token for method, path, token in hub.requests if method == "POST" and path.startswith(("/api/repos/", "/api/models/"))
    ]
    assert set(writing) == {f"Bearer {TOKEN}"}
    assert [hashlib.sha256(blob).hexdigest() for blob in hub.blobs.values()] == list(hub.blobs)


def test_what_arrives_is_loaded(hub: Hub, meta_lora: str, tmp_path: Path):
    push_meta_lora(meta_lora, "me/few-shot")
    for name, content in hub.commits[0].items():
        (tmp_path / name).write_bytes(content)
    found, expected = read_adapter(str(tmp_path)), read_adapter(meta_lora)
    assert all(torch.equal(found.updates()[name], update) for name, update in expected.updates().items())


def test_timm_loads_the_merged_model(hub: Hub, meta_lora: str, tmp_path: Path):
    """By `local-dir:`, which reads the same files as `hf-hub:`."""
    push_meta_lora(meta_lora, "me/merged", "timm")
    assert hub.commits[0].keys() == {"README.md", "config.json", "metric.safetensors", "model.safetensors"}
    for name, content in hub.commits[0].items():
        (tmp_path / name).write_bytes(content)
    card = hub.commits[0]["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "timm"
    assert 'timm.create_model("hf-hub:me/merged", pretrained=True)' in card
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    backbone = lr_ray.load(meta_lora).backbone
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        expected = encode_pixels(backbone, pixels, precision="fp32")
        torch.testing.assert_close(
            network(backbone.normalize(pixels)), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
        )
    assert list(network.pretrained_cfg["mean"]) == backbone.mean.tolist()
    tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=10, in_chans=1)  # to be fine-tuned
    assert tuned(torch.rand(1, 1, 32, 32)).shape == (1, 10)
    assert torch.equal(tuned.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)


def test_a_repository_that_is_there_gets_another_commit(hub: Hub, meta_lora: str):
    hub.repos["me/few-shot"] = {"private": False}
    push_meta_lora(meta_lora, "me/few-shot")
    push_meta_lora(meta_lora, "me/few-shot", "peft-hf")
    assert [commit.keys() for commit in hub.commits] == [FOLDER, FOLDER]


def test_private(hub: Hub, meta_lora: str):
    assert push_meta_lora(meta_lora, "me/few-shot", private=True).private
    assert hub.repos == {"me/few-shot": {"private": True}}
    assert len(hub.commits) == 1


def test_private_is_not_sent_to_a_public_repository(hub: Hub, meta_lora: str):
    """The hub itself ignores the wish where the repository is there."""
    hub.repos["me/few-shot"] = {"private": False}
    assert "--private, but it is there already and public" in line_of(meta_lora, "me/few-shot", private=True)
    assert hub.commits == []


def test_a_dry_run_sends_nothing(hub: Hub, meta_lora: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    done = CliRunner().invoke(app, ["push", meta_lora, "me/few-shot", "--dry-run"], catch_exceptions=False)
    assert hub.requests == []
    assert all(re.search(rf"^{re.escape(name)}: \d+ bytes$", done.stdout, re.MULTILINE) for name in FOLDER)
    assert f"nothing was sent; without --dry-run: to {hub.url}/me/few-shot, created if it is not there" in done.stdout


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/", 401, "push me/few-shot: the hub does not accept the token; set HF_TOKEN to one with the right to write"),
        ("/api/", 403, "push me/few-shot: the token has no right to write there; correct OWNER/NAME, or set HF_TOKEN"),
        ("/preupload/", 403, "push me/few-shot: the token has no right to write there"),
        ("/commit/", 409, "nothing was committed: run again"),
        ("/blobs/", 400, "gave no usable answer"),
    ],
)
def test_the_hub_refuses(hub: Hub, meta_lora: str, path: str, status: int, message: str):
    hub.refuse[path] = status
    assert message in line_of(meta_lora, "me/few-shot")
    assert hub.commits == []


def test_no_hub(hub: Hub, meta_lora: str, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert f"push me/few-shot: {address} gave no usable answer (ConnectError" in line_of(meta_lora, "me/few-shot")


def test_no_token(hub: Hub, meta_lora: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "push me/few-shot: there is no token; set HF_TOKEN" in line_of(meta_lora, "me/few-shot")
    assert hub.requests == []


@pytest.mark.parametrize(
    "repo_id", ["few-shot", "a/b/c", "me/", "/x", "me/a--b", "me/x.git", "me/ä", "me/" + "x" * 94, "me/x-"]
)
def test_no_repository_of_the_hub(hub: Hub, meta_lora: str, repo_id: str):
    assert f"{repo_id!r} is no repository of the hub; give OWNER/NAME" in line_of(meta_lora, repo_id)


def test_a_format_that_is_not_pushed(meta_lora: str):
    assert "--format 'onnx': there is no such format; give one of peft, peft-hf, timm" in line_of(meta_lora, "me/x", "onnx")
