"""`lr-ray bench serve`: the service as a person starts it, under load, against the bare backbone in one process."""

import io
import random
import statistics
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from lr_ray.bench.hostile import hostile_requests
from lr_ray.bench.load import Answers, Body, at_once, at_rate
from lr_ray.bench.service import FATAL_S, NUM_TASKS, Running, make_meta_lora, running
from lr_ray.bench.speed import write_result
from rich.table import Table

from lr_ray.data.images import DataConfig
from lr_ray.data.load import load_data
from lr_ray.model import Model, load
from lr_ray.report.progress import Reporter

BATCH = 32
"""Images of a request of many."""
_PNGS = 640
_CLIENTS = {"zip": 8, "png": 32}
"""Requests at once, of 32 images and of one."""
_ROUNDS, _BARE_S, _LOAD_S, _HALF_S = 3, 5.0, 12.0, 30.0
_WAYS = 5


def bench_serve(*, image_px: int, threads: int, soak_min: float, reporter: Reporter) -> dict[str, Any]:
    """Everything in one run; returns what it wrote to bench/results/serve.json.

    Raises:
        ClusterError: the service does not start.
        DataError: no CIFAR-FS below LR_RAY_DATA.
    """
    pngs = _cifar_pngs()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as root:
        meta_lora = make_meta_lora(root, image_px)
        model = load(meta_lora)
        reporter.say("starting the service")
        with running(meta_lora, root, pngs[0]) as service:
            found = _throughput(service, model, pngs, reporter)
            found |= {"first_answer_s": round(service.ready_s, 1)}
            found["latency"] = _latency(service, model, pngs, found["zip"]["images_per_s"] / BATCH / 2, reporter)
            reporter.say("hostile uploads")
            found["hostile"] = _hostile(service)
            reporter.say(f"{NUM_TASKS} tasks")
            found["tasks"] = _tasks(service, pngs)
            if soak_min:
                reporter.say(f"soak of {soak_min:g} min")
                found["soak"] = _soak(service, pngs, found["zip"]["images_per_s"] / BATCH / 2, soak_min * 60)
    settings = {"backbone": "embedded", "image_px": image_px, "threads": threads, "batch": BATCH, "clients": _CLIENTS}
    return write_result("serve", {"settings": settings, **found})


def table(found: Mapping[str, Any]) -> Table:
    """What was measured, a line for each thing, beside the bar that it is held to."""
    rows = Table("measured", "found", "bar", title="lr-ray serve, embedded backbone, {image_px} px".format(**found["settings"]))
    rows.add_row("bare backbone, one process", f"{found['bare_images_per_s']} images/s", "")
    for kind, what in (("zip", f"requests of {BATCH}"), ("classify", f"{BATCH} to classify"), ("png", "requests of one")):
        measured = "{images_per_s} images/s, {ratio} of the bare; p50 {p50_ms} ms, p99 {p99_ms} ms; failed {failed}"
        rows.add_row(f"saturated by {what}", measured.format(**found[kind]), "0.80" if kind == "zip" else "")
    half = "p50 {p50_ratio}×, p99 {p99_ratio}× the bare batch of {bare_batch_ms} ms ({requests} requests)"
    for name, bar in (("evenly", "3×"), ("at_random", "")):
        rows.add_row(f"at half of that, {name.replace('_', ' ')}", half.format(**found["latency"][name]), bar)
    rows.add_row("from the command to the first answer", f"{found['first_answer_s']} s", "15 s")
    rows.add_row("memory of {tasks} tasks".format(**found["tasks"]), "{grown_mb} MB".format(**found["tasks"]), "200 MB")
    hostile = "{uploads}, slowest {slowest_s} s ({slowest}); not refused: {not_refused}"
    rows.add_row("hostile uploads", hostile.format(**found["hostile"]), "1 s each")
    if "soak" in found:
        soak = "{requests} requests in {minutes} min, {killed} replicas killed, failed {failed}, slowest {slowest_s} s"
        rows.add_row("soak", soak.format(**found["soak"]), "none failed")
    return rows


def _cifar_pngs() -> list[bytes]:
    images = load_data(DataConfig(source="cifar-fs/val"))
    chosen = np.random.default_rng(0).choice(len(images), _PNGS, replace=False)
    return [_png_of(images.open_image(int(index))) for index in chosen]


def _png_of(image: Any) -> bytes:
    image.convert("RGB").save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def zip_of(pngs: Sequence[bytes]) -> Body:
    """One request of them all."""
    with zipfile.ZipFile(content := io.BytesIO(), "w") as archive:
        for index, png in enumerate(pngs):
            archive.writestr(f"{index}.png", png)
    return Body(content=content.getvalue(), content_type="application/zip", images=len(pngs))


def _bodies(pngs: Sequence[bytes]) -> dict[str, list[Body]]:
    return {
        "zip": [zip_of(pngs[start : start + BATCH]) for start in range(0, len(pngs), BATCH)],
        "png": [Body(content=png, content_type="image/png", images=1) for png in pngs],
    }


def _bare_images_per_s(model: Model, batch_size: int, duration_s: float) -> float:
    pixels = torch.randint(0, 256, (batch_size, 3, model.backbone.image_px, model.backbone.image_px), dtype=torch.uint8)
    start, count = time.perf_counter(), 0
    while (took := time.perf_counter() - start) < duration_s:
        model.embed(pixels)
        count += batch_size
    return count / took


def _throughput(service: Running, model: Model, pngs: Sequence[bytes], reporter: Reporter) -> dict[str, Any]:
    """The bare backbone and both forms of requests in turns, so that a noisy machine is noisy for all."""
    kinds, url = _bodies(pngs), f"{service.url}/v1/embeddings"
    task = _task_of(service, pngs)
    bare: list[float] = []
    loads: dict[str, list[Answers]] = {"zip": [], "png": [], "classify": []}
    for kind in _CLIENTS:  # as warm as it will be
        at_once(url, kinds[kind], service.headers, clients=_CLIENTS[kind], duration_s=3)
    _bare_images_per_s(model, model.batch_size, 1)
    with reporter.track("throughput", _ROUNDS) as advance:
        for index in range(_ROUNDS):
            bare.append(max(_bare_images_per_s(model, size, _BARE_S) for size in (BATCH, model.batch_size)))
            for kind in _CLIENTS:
                loads[kind].append(at_once(url, kinds[kind], service.headers, clients=_CLIENTS[kind], duration_s=_LOAD_S))
            loads["classify"].append(at_once(task, kinds["zip"], service.headers, clients=_CLIENTS["zip"], duration_s=_LOAD_S))
            advance(f"round {index + 1} of {_ROUNDS}")
    return {"bare_images_per_s": round(statistics.median(bare), 1)} | {
        kind: _summary(answers, bare) for kind, answers in loads.items()
    }


def _summary(answers: Sequence[Answers], bare: Sequence[float]) -> dict[str, Any]:
    return {
        "images_per_s": round(statistics.median(a.images_per_s for a in answers), 1),
        "ratio": round(statistics.median(a.images_per_s / speed for a, speed in zip(answers, bare, strict=True)), 3),
        "p50_ms": round(1000 * statistics.median(a.quantile(0.5) for a in answers), 1),
        "p99_ms": round(1000 * statistics.median(a.quantile(0.99) for a in answers), 1),
        "load_share": round(statistics.median(a.load_share for a in answers), 3),
        "failed": _failures(answers),
    }


def _failures(answers: Sequence[Answers]) -> dict[str, int]:
    return dict(sum((a.failed for a in answers), Counter[str]()))


def _task_of(service: Running, pngs: Sequence[bytes]) -> str:
    """URL at which images are classified by a new task."""
    body = _support_of(pngs[:_WAYS])
    answer = httpx.post(f"{service.url}/v1/tasks", content=body.content, headers=_typed(service, body), timeout=FATAL_S)
    return f"{service.url}/v1/tasks/{answer.raise_for_status().json()['id']}/classify"


def _support_of(pngs: Sequence[bytes]) -> Body:
    with zipfile.ZipFile(content := io.BytesIO(), "w") as archive:
        for index, png in enumerate(pngs):
            archive.writestr(f"class {index}/{index}.png", png)
    return Body(content=content.getvalue(), content_type="application/zip", images=len(pngs))


def _typed(service: Running, body: Body) -> dict[str, str]:
    return {**service.headers, "Content-Type": body.content_type}


def _latency(service: Running, model: Model, pngs: Sequence[bytes], per_s: float, reporter: Reporter) -> dict[str, Any]:
    """At half of the load that saturates, against the bare forward pass of one request's images."""
    reporter.say(f"latency at {per_s:.1f} requests of {BATCH} images a second")
    url, bodies = f"{service.url}/v1/embeddings", _bodies(pngs)["zip"]
    found: dict[str, Any] = {"requests_per_s": round(per_s, 2)}
    for name, evenly in (("evenly", True), ("at_random", False)):
        before = _bare_images_per_s(model, BATCH, _BARE_S)
        answers = at_rate(url, bodies, service.headers, per_s=per_s, duration_s=_HALF_S, evenly=evenly)
        after = _bare_images_per_s(model, BATCH, _BARE_S)
        bare_s = BATCH / statistics.mean((before, after))
        found[name] = {
            "bare_batch_ms": round(1000 * bare_s, 1),
            "p50_ms": round(1000 * answers.quantile(0.5), 1),
            "p99_ms": round(1000 * answers.quantile(0.99), 1),
            "p50_ratio": round(answers.quantile(0.5) / bare_s, 2),
            "p99_ratio": round(answers.quantile(0.99) / bare_s, 2),
            "requests": len(answers.seconds),
            "failed": dict(answers.failed),
        }
    return found


def _hostile(service: Running) -> dict[str, Any]:
    """Each upload by itself; what was not refused as the sender's mistake, and the slowest."""
    times: dict[str, float] = {}
    wrong: list[str] = []
    with httpx.Client(base_url=service.url, headers=dict(service.headers), timeout=FATAL_S) as client:
        for request in hostile_requests():
            start = time.perf_counter()
            answer = client.post(request.path, content=request.content, headers={"Content-Type": request.content_type})
            times[request.name] = time.perf_counter() - start
            problem = answer.headers.get("content-type") == "application/problem+json"
            if answer.status_code // 100 != 4 or not problem:
                wrong.append(f"{request.name}: {answer.status_code}")
    slowest = max(times, key=times.__getitem__)
    return {"uploads": len(times), "not_refused": wrong, "slowest_s": round(times[slowest], 3), "slowest": slowest}


def _tasks(service: Running, pngs: Sequence[bytes]) -> dict[str, Any]:
    """Memory of all processes before tasks are made, and when all of them have been read."""
    before = service.memory()
    rng, ids, start = random.Random(0), [], time.perf_counter()
    with httpx.Client(base_url=service.url, headers=dict(service.headers), timeout=FATAL_S) as client:
        for _ in range(NUM_TASKS):
            body = _support_of(rng.sample(pngs, _WAYS))
            answer = client.post("/v1/tasks", content=body.content, headers={"Content-Type": body.content_type})
            ids.append(answer.raise_for_status().json()["id"])
        made_s = time.perf_counter() - start
        for task_id in ids:
            client.get(f"/v1/tasks/{task_id}").raise_for_status()
    grown = service.memory()
    grown.subtract(before)
    return {
        "tasks": len(ids),
        "ways": _WAYS,
        "made_per_s": round(len(ids) / made_s, 1),
        "grown_mb": round(grown.total() / 1e6, 1),
        "grown_mb_by_process": {title: round(size / 1e6, 1) for title, size in grown.most_common() if abs(size) > 1e6},
    }


def _soak(service: Running, pngs: Sequence[bytes], per_s: float, duration_s: float) -> dict[str, Any]:
    """Requests at a bounded rate, while a process with the backbone is killed every now and then."""
    begin, over, kills = service.memory(), threading.Event(), []
    rng = random.Random(0)
    memory: list[dict[str, Any]] = []

    def kill() -> None:
        while not over.wait(rng.uniform(20, 60)):
            sizes = {title: round(size / 1e6) for title, size in service.memory().most_common() if size > 1e7}
            memory.append({"minute": round((time.perf_counter() - start) / 60, 1), **sizes})
            found = [p for p in psutil.Process(service.process.pid).children(recursive=True) if _is_backbone(p)]
            if found:
                rng.choice(found).kill()
                kills.append(time.perf_counter())

    start = time.perf_counter()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        answers = at_rate(
            f"{service.url}/v1/embeddings", _bodies(pngs)["zip"], service.headers, per_s=per_s, duration_s=duration_s
        )
    finally:
        over.set()
        killer.join()
    grown = service.memory()
    grown.subtract(begin)
    return {
        "minutes": round(duration_s / 60, 1),
        "requests": len(answers.seconds) + answers.failed.total(),
        "killed": len(kills),
        "failed": dict(answers.failed),
        "first_failure": answers.first_failure,
        "p99_ms": round(1000 * answers.quantile(0.99), 1),
        "slowest_s": round(answers.quantile(1.0), 2),
        "grown_mb_by_process": {title: round(size / 1e6, 1) for title, size in grown.most_common() if abs(size) > 1e6},
        "memory_mb": memory,
    }


def _is_backbone(process: psutil.Process) -> bool:
    try:
        return "".join(process.cmdline()[:1]).startswith("ray::ServeReplica:lr-ray:backbone")
    except psutil.Error:
        return False
