"""The page: its files and headers, and the whole of it in a browser, over an untrained model in this process."""

import asyncio
import importlib.resources
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from starlette.testclient import TestClient
from torch import Tensor

import lr_ray
from bench.uploads import png
from lr_ray.model import Model
from lr_ray.serving.api import Service, make_app
from lr_ray.serving.client import Client
from lr_ray.serving.keys import Keyring, add_key
from lr_ray.serving.models import BACKBONE, Catalogue, ServedModel
from lr_ray.serving.multiplex import Multiplex
from lr_ray.serving.store import TaskStore
from lr_ray.vit.backbone import BackboneConfig, load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, LowRank

PAGE = Path(str(importlib.resources.files("lr_ray.serving.page")))
SAMPLE = PAGE / "sample"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browsed = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; Debian's package is `chromium`")
AWKWARD = ['a="b" $x `y`', "query", "größe/☃\\'"]

# ----------------------------------------------------------------------------------------------------- files and headers


def test_the_page_loads_nothing_from_elsewhere(client: TestClient):
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    for path in [*(PAGE / "files").iterdir()]:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|\beval\b|\son\w+=|\sstyle=|<style", text), path
        for name in re.findall(r'(?:src|href)="page/([^"]+)"|from "\./([^"]+)"', text):
            part = client.get(f"/page/{''.join(name)}")
            assert part.status_code == 200, name
            assert part.headers["content-security-policy"] == answer.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["", "__init__.py", "..%2f__init__.py", "%2e%2e/x", "none.js", "sample%2fsample.json"])
def test_nothing_else_is_given(client: TestClient, name: str):
    assert client.get(f"/page/{name}").status_code == 404


def test_the_sample_is_small_and_whole(client: TestClient):
    sample = client.get("/page/sample.json").json()
    names = [name for files in sample["classes"].values() for name in files] + sample["queries"]
    assert sorted([*names, "sample.json"]) == sorted(path.name for path in SAMPLE.iterdir())
    assert all(client.get(f"/page/{name}").content.startswith(b"\x89PNG") for name in names)
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 100_000


# --------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def multiplex() -> Multiplex:
    """An untrained ViT-Tiny at 48 px, of 3 × 3 patches, and a LoRA of drawn weights."""
    backbone = load_backbone(BackboneConfig(name="vit_tiny_patch16_224", image_px=48, pretrained=False))
    generator = torch.Generator().manual_seed(0)
    spec = AdapterSpec(adapter_id="a", digest="", backbone="tiny", backbone_digest=backbone.digest, class_names=())
    a, b = 0.2 * torch.randn(4, 192, generator=generator), 0.2 * torch.randn(576, 4, generator=generator)
    modules = {f"blocks.{i}.attn.qkv": LowRank(a=a, b=b, scale=1.0) for i in range(12)}
    models = tuple(ServedModel(name=name, digest=name) for name in ("drawn", BACKBONE))
    model = Model(backbone=backbone, precision="fp32", batch_size=64)
    return Multiplex(
        catalogue=Catalogue(models=models, num_features=192),
        models={"drawn": model, BACKBONE: model},
        adapters={"drawn": Adapter(spec=spec, modules=modules)},
    )


@pytest.fixture(scope="module")
def running(multiplex: Multiplex, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    """URL of the application on loopback, in a thread, and what it works with."""

    async def embed(pixels: Tensor, model: str) -> Tensor:
        return await asyncio.to_thread(multiplex.embed, model, pixels)

    async def attend(pixels: Tensor, model: str) -> Tensor:
        return await asyncio.to_thread(multiplex.attend, model, pixels)

    store = TaskStore(root=str(tmp_path_factory.mktemp("tasks")), models=multiplex.catalogue.digests)
    service = Service(embed=embed, attend=attend, models=multiplex.catalogue, image_px=multiplex.image_px, store=store)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, running: tuple[str, Service]) -> Iterator[Callable[..., Page]]:
    """`visit(**of_context)`: the page in a new window; in the end no error on its console, and no request elsewhere."""
    noted: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            noted.append(message.text)

    def open_page(**options: Any) -> Page:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: noted.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((running[0], f"blob:{running[0]}")) else noted.append(r.url))
        page.goto(running[0])
        return page

    yield open_page
    for context in browser.contexts:
        context.close()
    assert noted == []


def answered(page: Page) -> None:
    expect(page.locator("#status")).to_have_text(re.compile(r"images classified"), timeout=60_000)


def load_sample(page: Page) -> None:
    page.get_by_role("button", name="Load the sample task").click()
    expect(page.locator(".thumb")).to_have_count(21)


def sample_files() -> tuple[dict[str, list[Path]], list[Path]]:
    sample = json.loads((SAMPLE / "sample.json").read_text())
    classes = {name: [SAMPLE / file for file in files] for name, files in sample["classes"].items()}
    return classes, [SAMPLE / file for file in sample["queries"]]


def headline(row: Any) -> str:
    return "None of these" if row.none_of_these else row.class_name


@browsed
def test_the_sample_task_is_answered_as_the_service_answers(visit: Callable[..., Page], running: tuple[str, Service]):
    page = visit()
    load_sample(page)
    page.get_by_label("Show where the model looks").check()
    page.get_by_role("button", name="Classify", exact=True).click()
    answered(page)
    classes, queries = sample_files()
    with Client(running[0]) as client:
        mine, plain = (client.classify_once(classes, queries, model=name).results for name in (None, BACKBONE))
        features = torch.tensor(client.embed([*[f for files in classes.values() for f in files], *queries]).features)
        grids = torch.tensor(client.attend(queries).grids)
    assert page.locator(".result h3").all_inner_texts() == [headline(row) for row in mine]
    names = [[c.class_name for row in rows for c in row.ranked[:3]] for rows in (mine, plain)]
    for selector, expected in (
        (".opinion:not(.plain) li span:first-child", names[0]),
        (".plain li span:first-child", names[1]),
    ):
        assert page.locator(selector).all_inner_texts() == expected
    assert (
        page.locator(".opinion").first.locator("li").first.inner_text().split("\n")[1] == f"{100 * mine[0].probability:.1f} %"
    )
    labels = [name for name, files in classes.items() for _ in files]
    nearest = torch.cdist(features[15:], features[:15]).argsort(dim=1)[:, :3].flatten()
    shown = [text.partition(",")[0] for text in page.locator(".nearest li").all_inner_texts()]
    assert shown == [labels[index] for index in nearest]
    typical = [3 * c + int((f - f.mean(dim=0)).norm(dim=1).argmin()) for c, f in enumerate(features[:15].split(3))]
    alts = page.locator(".thumb.typical img").evaluate_all("all => all.map(image => image.alt)")
    assert alts == [[f"{f.name}, typical" for files in classes.values() for f in files][index] for index in typical]
    row, column = divmod(int(grids[0].argmax()), 3)
    looks = page.locator("canvas").first.get_attribute("aria-label") or ""
    assert f"most at row {row + 1}, column {column + 1} of 3 by 3 patches" in looks
    page.get_by_label("Compare with the plain backbone").uncheck()
    expect(page.locator(".plain")).to_have_count(0)


@browsed
@pytest.mark.parametrize("names", [["lambda", "xi"], AWKWARD], ids=["sample", "awkward"])
def test_what_is_copied_gives_the_same_answer(
    visit: Callable[..., Page], running: tuple[str, Service], tmp_path: Path, names: list[str]
):
    files = {name: tmp_path / f"{i} it's; {i}.png" for i, name in enumerate(names)}
    for i, path in enumerate(files.values()):
        path.write_bytes(png(i, shade=80 * i))
    page = visit()
    for i, (name, path) in enumerate(files.items()):
        if i > 1:
            page.get_by_role("button", name="Add a class").click()
        page.get_by_role("textbox", name="Name of the class").nth(i).fill(name)
        page.locator("#classes .bucket").nth(i).locator("input[type=file]").set_input_files(path)
    page.locator("#queries input").set_input_files([*files.values()])
    page.get_by_role("button", name="Classify", exact=True).click()
    answered(page)
    with Client(running[0]) as client:
        rows = client.classify_once({name: [path] for name, path in files.items()}, [*files.values()]).results
    assert [row.class_name for row in rows] == names
    for what, command in (("curl", ["bash", "-c"]), ("Python", [sys.executable, "-c"])):
        page.get_by_role("button", name=f"Copy as {what}").click()
        expect(page.locator("#copied")).to_have_text(re.compile(f"Copied as {what}"))
        copied = page.evaluate("navigator.clipboard.readText()")
        environment = os.environ | {"PYTHONPATH": str(Path(lr_ray.__file__).parents[1])}
        done = subprocess.run([*command, copied], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if what == "curl":
            found = json.loads(done.stdout)["results"]
            assert [(row["class"], row["probability"]) for row in found] == [(r.class_name, r.probability) for r in rows]
        else:
            assert done.stdout.splitlines() == [
                f"{path.name} {row.class_name} {row.probability} {row.none_of_these}"
                for path, row in zip(files.values(), rows, strict=True)
            ]


@browsed
def test_images_are_dropped_and_pasted(visit: Callable[..., Page]):
    page = visit()
    give = """([selector, kind]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array([1])], "x.png", {type: "image/png"}));
        data.items.add(new File(["x"], "notes.txt", {type: "text/plain"}));
        const target = document.querySelector(selector);
        const options = {bubbles: true, cancelable: true};
        const event = kind === "drop" ? new DragEvent(kind, {...options, dataTransfer: data})
                                      : new ClipboardEvent(kind, {...options, clipboardData: data});
        return target.dispatchEvent(event);
    }"""
    assert page.evaluate(give, ["#classes .bucket", "drop"]) is False
    expect(page.locator("#classes .bucket").first.locator(".thumb")).to_have_count(1)
    expect(page.get_by_text("notes.txt: no PNG, JPEG or WebP; left out.")).to_be_visible()
    page.get_by_role("textbox", name="Name of the class").nth(1).focus()
    page.evaluate(give, ["body", "paste"])
    expect(page.locator("#classes .bucket").nth(1).locator(".thumb")).to_have_count(1)
    page.get_by_role("button", name="Add a class").focus()
    page.evaluate(give, ["body", "paste"])
    expect(page.locator("#queries .thumb")).to_have_count(1)
    assert page.evaluate(give, ["h1", "drop"]) is False  # beside a bucket: not opened in place of the page


@browsed
def test_photographs_are_made_smaller_before_they_are_sent(visit: Callable[..., Page]):
    page = visit()
    page.evaluate("""async () => {
        const canvas = Object.assign(document.createElement("canvas"), {width: 4000, height: 1000});
        canvas.getContext("2d").fillRect(0, 0, 9, 9);
        const data = new DataTransfer();
        data.items.add(new File([await new Promise(done => canvas.toBlob(done))], "photo.png", {type: "image/png"}));
        document.querySelector("#queries").dispatchEvent(new DragEvent("drop", {dataTransfer: data}));
    }""")
    image = page.locator("#queries .thumb img")
    expect(image).to_have_count(1)
    assert image.evaluate("async image => { await image.decode(); return [image.naturalWidth, image.naturalHeight] }") == [
        1600,
        400,
    ]


@browsed
def test_problems_are_shown_where_they_belong(visit: Callable[..., Page], tmp_path: Path):
    page = visit()
    classify = page.get_by_role("button", name="Classify", exact=True)
    in_classes, in_queries = page.locator("#classes-problem"), page.locator("#queries-problem")
    classify.click()
    expect(in_classes).to_have_text("Class “Class 1” has no images; add one, or remove the class.")
    page.route("**/page/sample.json", lambda route: route.abort())
    page.get_by_role("button", name="Load the sample task").click()
    expect(page.locator("#problem")).to_have_text("The service does not answer; is it still running?")
    page.unroute("**/page/sample.json")
    load_sample(page)
    expect(page.locator(".problem:visible")).to_have_count(0)
    page.get_by_role("textbox", name="Name of the class").nth(1).fill("lambda")
    classify.click()
    expect(in_classes).to_have_text("Two classes are called “lambda”; give one of them another name.")
    page.get_by_role("textbox", name="Name of the class").nth(1).fill(" ")
    classify.click()
    expect(in_classes).to_have_text("A class has no name; give it one.")
    page.get_by_role("textbox", name="Name of the class").nth(1).fill("xi")
    for path, place, problem in ((tmp_path / "b.png", "#queries", in_queries), (tmp_path / "c.png", "#classes", in_classes)):
        path.write_bytes(png()[:99])
        page.locator(f"{place} input[type=file]").first.set_input_files(path)
        classify.click()
        expect(problem).to_have_text(f"Image '{path.name}' is truncated; send the whole PNG file")
        expect(page.locator(".thumb.wrong img")).to_have_attribute("alt", f"{path.name}, wrong")
        page.get_by_role("button", name=f"Remove {path.name}").focus()
        page.keyboard.press("Enter")
        expect(page.locator(".thumb.wrong")).to_have_count(0)
    page.route("**/v1/classify*", lambda route: route.abort())
    classify.click()
    expect(page.locator("#problem")).to_have_text("The service does not answer; is it still running?")
    page.unroute("**/v1/classify*")
    classify.click()
    answered(page)
    expect(page.locator(".problem:visible")).to_have_count(0)
    page.get_by_role("button", name="Remove class xi").click()
    expect(page.locator("#stale")).to_be_visible()


@browsed
def test_a_key_is_asked_for_and_kept_in_this_tab(visit: Callable[..., Page], running: tuple[str, Service], tmp_path: Path):
    secret = add_key(tmp_path / "keys.json", "ann")
    running[1].keyring = Keyring(path=tmp_path / "keys.json")
    try:
        page = visit()
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(page.locator("#key-problem")).to_contain_text("no valid API key")
        field.fill(secret)
        field.press("Enter")
        expect(field).to_be_hidden()
        load_sample(page)
        page.get_by_role("button", name="Classify", exact=True).click()
        answered(page)
        page.get_by_role("button", name="Copy as curl").click()
        expect(page.locator("#code-text")).to_contain_text('-H "Authorization: Bearer $LR_RAY_KEY"')
        page.get_by_role("button", name="Copy as Python").click()
        expect(page.locator("#code-text")).to_contain_text('key=os.environ["LR_RAY_KEY"]')
        assert secret not in page.content()
        page.reload()
        expect(page.get_by_label("Model", exact=True)).to_be_enabled()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    finally:
        running[1].keyring = None


@browsed
def test_a_service_that_was_away_is_asked_again(visit: Callable[..., Page]):
    page = visit()
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.locator("#problem")).to_have_text("The service does not answer; is it still running?")
    page.unroute("**/v1/models")
    load_sample(page)
    page.get_by_role("button", name="Classify", exact=True).click()
    answered(page)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Load the sample task").click()
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator(".result")).to_have_count(0)


@browsed
def test_everything_is_done_by_keys(visit: Callable[..., Page]):
    page = visit()
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the answers")).to_be_focused()
    reached: list[str] = []
    for _ in range(70):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
        if reached[-1] == "sample":
            page.keyboard.press("Enter")
            expect(page.locator(".thumb")).to_have_count(21)
        if reached[-1] == "classify":
            page.keyboard.press("Space")
            answered(page)
            expect(page.locator("#classify")).to_be_focused()
        if reached[-1] == "attention":
            page.keyboard.press("Space")
            expect(page.locator("canvas")).to_have_count(6)
        if reached[-1] == "copy-python":
            page.keyboard.press("Enter")
            expect(page.locator("#code-text")).to_contain_text("classify_once")
            break
        ring = page.evaluate(
            "getComputedStyle(document.activeElement.closest('.choose') ?? document.activeElement).outlineStyle"
        )
        assert ring == "solid", reached[-1]
    wanted = ["model", "sample", "Name of the class", "Remove lambda-1.png", "Choose images of lambda", "Remove class xi"]
    assert [name for name in [*wanted, "add", "classify", "compare", "attention"] if name not in reached] == []


@browsed
def test_it_is_accessible_and_fits_every_width(visit: Callable[..., Page]):
    page = visit(reduced_motion="reduce")

    def check(scheme: str) -> None:
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page).response["violations"]
        assert [(v["id"], [node["html"] for node in v["nodes"]][:3]) for v in found] == []
        for width in (320, 360, 768, 1400):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width

    page.get_by_role("button", name="Classify", exact=True).click()  # a problem is on the page, too
    check("light")
    load_sample(page)
    page.get_by_label("Show where the model looks").check()
    page.get_by_role("button", name="Classify", exact=True).click()
    answered(page)
    page.get_by_role("button", name="Copy as curl").click()
    check("light")
    check("dark")
