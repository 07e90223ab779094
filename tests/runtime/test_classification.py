"""`lr-ray classify --output`: the answers of `classify_folder`, whatever is damaged, lost or asked again on the way."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from lr_ray.cli.main import app
from typer.testing import CliRunner

import lr_ray
from bench.uploads import encoded, picture, png
from lr_ray.config import RayConfig
from lr_ray.errors import AdapterError, LrRayError, StorageError
from lr_ray.model import load_parts
from lr_ray.runtime import classification
from lr_ray.runtime.board import start_board
from lr_ray.runtime.classification import ClassificationActor, ClassificationJob, Piece, classify_prefix
from lr_ray.serving.limits import Limits
from lr_ray.serving.local import answer_row, classify_folder, embed_support, read_support
from lr_ray.storage.filesystem import delete, list_files, read_bytes, write_bytes
from tests.jobs import QUIET
from tests.s3 import Fault, FaultyProxy

SUPPORT = {f"{name}/{seed}.png": png(seed, shade=shade) for seed in range(3) for name, shade in (("dark", 0), ("light", 190))}
GOOD = {
    "a.png": png(5),
    "below/b.png": png(6, shade=190),
    "below/deeper/ü 100%.JPG": encoded(picture(7, shade=90), "JPEG"),
    "c.webp": encoded(picture(8, shade=60), "WEBP"),
    "z.jpeg": encoded(picture(9, size=(300, 20), shade=190), "JPEG"),
}
BAD = {
    "below/0.png": (png()[:-20], "is truncated; send the whole PNG file"),
    "large.jpg": (b"\xff\xd8\xff" + bytes(Limits().image_bytes), "bytes; at most 10485760 are allowed"),
    "moving.gif": (encoded(picture(0), "GIF"), "is no PNG, JPEG or WebP"),
    "strip.png": (encoded(picture(0, size=(400, 2))), "a side may be 64 times the other"),
}
FILES = GOOD | {name: content for name, (content, _) in BAD.items()}


def save(root: str, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        write_bytes(f"{root}/{name}", content)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With `support` and `query`, and beside the images what is none."""
    save(str(tmp_path / "support"), SUPPORT)
    save(str(tmp_path / "query"), FILES | {"notes.txt": b"no image"})
    return tmp_path


def rows_of(output: str) -> list[dict[str, Any]]:
    """As a reader of Parquet finds them."""
    tables = [
        pq.read_table(io.BytesIO(read_bytes(f"{output}/rows/{name}"))) for name in list_files(f"{output}/rows", suffix="")
    ]
    return [row for table in tables for row in table.to_pylist()]


def near(row: dict[str, Any]) -> dict[str, Any]:
    """Equal to a row whose images were in another batch of the backbone's."""
    return {name: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for name, value in row.items()}


def contents(output: str) -> dict[str, bytes]:
    return {name: read_bytes(f"{output}/{name}") for name in list_files(output, suffix="")}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_batch_gives_what_classify_gives_locally_and_on_s3(
    meta_lora: str, folder: Path, bucket: str, s3: FaultyProxy
) -> None:
    support, query, output = (str(folder / name) for name in ("support", "query", "out"))
    words = ["classify", meta_lora, "--support", support, "--query", query, "--output", output, "--reject", "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)

    assert json.loads(done.stdout) == {"output": f"{output}/rows", "files": 1, "rows": len(FILES), "errors": len(BAD)}
    rows = rows_of(output)
    assert [row["file"] for row in rows] == sorted(FILES)
    assert pq.read_table(f"{output}/rows").num_rows == len(FILES)
    _, expected = classify_folder(lr_ray.load(meta_lora), support, save(str(folder / "good"), GOOD))
    assert {row["file"]: row for row in rows if row["error"] is None} == {
        name: near(answer_row(name, found, reject=True) | {"error": None}) for name, found in expected
    }
    assert {row["none_of_these"] for row in rows if row["error"] is None} == {True, False}
    for row in rows:
        if row["error"] is not None:
            assert BAD[row["file"]][1] in row["error"]
            assert "\n" not in row["error"]
            assert {row[name] for name in ("class", "probability", "distance", "none_of_these")} == {None}

    check_on_s3(meta_lora, rows, bucket, s3)


def check_on_s3(meta_lora: str, expected: list[dict[str, Any]], bucket: str, s3: FaultyProxy) -> None:
    """The same with everything on S3: stopped after two pieces, one lost, gone on with, asked again, and changed."""
    support, query = save(f"{bucket}/support", SUPPORT), save(f"{bucket}/query", FILES)
    output = f"{bucket}/out"

    def run() -> dict[str, Any]:
        found = classify_prefix(meta_lora, support, query, output, QUIET, reject=True, files_per_piece=2)
        return asdict(found)

    def commits() -> list[str]:
        """Names of the files that were written since faults were set, below the output."""
        puts = [request.partition("?")[0] for request in s3.requests if request.startswith("PUT")]
        return sorted(put.removeprefix(f"PUT /{output.removeprefix('s3://')}/") for put in puts)

    def faults() -> Iterator[Fault | None]:
        while len([request for request in s3.requests[:-1] if request.startswith("PUT") and "/rows/" in request]) < 2:
            yield None
        yield from repeat("forbidden")

    s3.set_faults(faults())
    with pytest.raises(StorageError, match=r"(Access Denied|Forbidden); check the rights on it .*what was finished is kept$"):
        run()
    s3.set_faults(())
    first = contents(output)  # an actor that was still starting may write one more, now or later
    lost, *kept = sorted(first.keys() - {"claim.json"})
    assert kept
    delete(f"{output}/{lost}")
    s3.set_faults(())

    summary = run()

    assert summary == {"output": f"{output}/rows", "files": 5, "rows": len(FILES), "errors": len(BAD)}
    whole = contents(output)
    assert commits() == sorted(whole.keys() - {"claim.json", *kept})
    assert {name: whole[name] for name in first} == first
    assert rows_of(output) == [near(row) for row in expected]
    s3.set_faults(())
    assert run() == summary
    assert (commits(), contents(output)) == ([], whole)

    write_bytes(f"{query}/a.png", FILES["a.png"][:-1] + b"\0")  # of the same size
    with pytest.raises(StorageError, match=r"holds another run's results \(query.digest was"):
        run()


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_gives_up_what_would_be_wrong_or_go_on_for_ever(meta_lora: str, folder: Path) -> None:
    parts = load_parts(meta_lora)
    digest, support = parts.digest(), embed_support(parts.merged(), read_support(str(folder / "support")), reject=False)
    job = ClassificationJob(
        meta_lora=meta_lora, model=digest, support=support, temperature=1.0, reject=False, query=str(folder / "query")
    )
    piece = Piece(uri=str(folder / "out" / "part.parquet"), names=["a.png", "gone.png"], sizes=[len(GOOD["a.png"]), 9])
    config, board = RayConfig(max_failures=0), start_board()

    assert ClassificationActor(job, config, board).commit(piece) == 1
    (answered, gone) = pq.read_table(piece.uri).to_pylist()
    assert (answered["class"], gone["error"]) == ("dark", "it was there when the folder was listed, and is not any more")
    again = replace(piece, names=["c.webp"])  # a repeated attempt takes what is there
    assert ClassificationActor(job, config, board).commit(again) == 1
    Path(piece.uri).unlink()
    with pytest.raises(StorageError, match=r"part\.parquet: its worker was lost 1 times; .* between 'a\.png' and 'gone\.png'"):
        ClassificationActor(job, config, board).commit(piece)
    with pytest.raises(AdapterError, match="changed, or is another one on another machine"):
        ClassificationActor(replace(job, model="another"), config, start_board()).commit(piece)
    batch = {name: np.array([value]) for name, value in asdict(piece).items()}
    absent = ClassificationActor(replace(job, meta_lora=str(folder)), config, start_board())(batch)
    assert absent["error"][0].startswith(f"{folder} is no adapter")


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "no images": ({"query": "support/none"}, r"support/none: no images below it; give a folder of images, or a URI"),
    "one image": ({"query": "query/a.png"}, "a.png is a file; a batch job takes a folder or a URI of images; leave --output"),
    "a scheme of the query": (
        {"query": "nfs3://images"},
        "cannot look up nfs3://images: unknown scheme nfs3:// .*; correct the URI",
    ),
    "a scheme of the support": ({"support": "nfs3://images"}, "cannot list nfs3://images: unknown scheme"),
    "a scheme of the output": ({"output": "nfs3://images"}, "cannot read nfs3://images/claim.json: unknown scheme"),
    "an output below a file": ({"output": "query/a.png/out"}, "cannot write .*/query/a.png/out/claim.json: Not a directory"),
    "support of one class": ({"support": "one"}, "one has one class only, 'dark'; give images of two or more"),
    "support without classes": ({"support": "file://{folder}/one/dark"}, "no class folders with images in it"),
    "support of one image a class": ({"support": "single"}, "--reject: every class of --support has one image"),
    "damaged support": ({"support": "damaged"}, "damaged/dark/0.png does not decode"),
    "a name that is not UTF-8": ({"query": "odd"}, r"the file name '\\udcff\.png' is not UTF-8; rename it"),
    "no meta-LoRA": ({"meta_lora": "query"}, "query is no adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_ray_starts(
    meta_lora: str, folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    save(str(folder / "one"), {"dark/0.png": png()})
    save(str(folder / "single"), {"dark/0.png": png(), "light/0.png": png(1)})
    save(str(folder / "damaged"), SUPPORT | {"dark/0.png": b"x"})
    (folder / "odd").mkdir()
    Path(os.fsdecode(os.fsencode(folder / "odd") + b"/\xff.png")).write_bytes(png())
    monkeypatch.setattr(classification, "ray_session", lambda *_: pytest.fail("Ray was started"))
    monkeypatch.chdir(folder)
    changes, message = REFUSED[case]
    paths = {"meta_lora": meta_lora, "support": "support", "query": "query", "output": "out"}
    paths |= {name: path.format(folder=folder) for name, path in changes.items()}

    with pytest.raises(LrRayError, match=message):
        classify_prefix(**paths, reporter=QUIET, reject=True)


def test_another_jobs_output_is_refused(meta_lora: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_arguments: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(classification, "ray_session", stop)
    support, query, output = (str(folder / name) for name in ("support", "query", "out"))

    def run(**options: Any) -> None:
        classify_prefix(meta_lora, support, query, output, QUIET, **options)

    with pytest.raises(InterruptedError):
        run()
    with pytest.raises(InterruptedError):  # the same again
        run()
    for options, message in (
        ({"temperature": 2.0}, "temperature was 1.0, now 2.0"),
        ({"reject": True}, "reject was false, now true"),
        ({"files_per_piece": 3}, "files_per_piece was 500, now 3"),
    ):
        with pytest.raises(StorageError, match=rf"out is another run's \(.*{message}.*; choose another --output"):
            run(**options)
    save(support, {"dark/new.png": png(9)})
    with pytest.raises(StorageError, match="support was "):
        run()
    (folder / "support" / "dark" / "new.png").unlink()
    save(query, {"new.png": png(9)})
    with pytest.raises(StorageError, match=rf"query.files was {len(FILES)}, now {len(FILES) + 1}"):
        run()


def test_what_an_actor_takes_and_which_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(*resources: dict[str, float]) -> tuple[float, int]:
        nodes = [{"Alive": True, "Resources": found} for found in resources]
        found = classification._share_of([*nodes, {"Alive": False, "Resources": {"GPU": 8.0}}], RayConfig())
        return found.num_gpus_per_actor, found.cpus_per_actor

    assert share({"CPU": 16.0}) == (0, 1)
    assert share({"CPU": 16.0, "GPU": 4.0}) == (1, 4)
    assert share({"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}) == (1, 4)
    assert share({"CPU": 1.0, "GPU": 2.0}) == (1, 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert classification._ray_config().address == "local"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert classification._ray_config().address == "10.0.0.1:6379"
