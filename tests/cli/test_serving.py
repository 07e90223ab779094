"""`lr-ray classify` and `lr-ray serve key`, as a person calls them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lr_ray.cli.main import app
from PIL import ExifTags, Image
from typer.testing import CliRunner, Result

import lr_ray
from lr_ray.errors import DataError
from lr_ray.serving.keys import find_key, read_keys

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def answer(*arguments: object) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def save(path: Path, seed: int, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 60, (36, 40, 3))
    Image.fromarray((noise + shade).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Support and query: dark and light images, and in the queries a red one."""
    for seed in range(3):
        for name, shade in (("dark", 0), ("light", 190)):
            save(tmp_path / ("query" if seed == 2 else f"support/{name}") / f"{name}{seed}.png", seed, shade)
    (tmp_path / "query" / "below").mkdir()
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "query" / "below" / "red.png")
    (tmp_path / "query" / "notes.txt").write_text("no image")
    return tmp_path / "support", tmp_path / "query"


def test_classify_gives_what_load_gives(meta_lora: str, folders: tuple[Path, Path]):
    support, query = folders
    found = answer("classify", meta_lora, "--support", support, "--query", query)
    files = ["below/red.png", "dark2.png", "light2.png"]
    assert [row["file"] for row in found["results"]] == files
    labelled = [support / name / f"{name}{seed}.png" for name in ("dark", "light") for seed in range(2)]
    labels = [file.parent.name for file in labelled]
    logits = lr_ray.load(meta_lora).classify(labelled, labels, [query / file for file in files])
    assert found["classes"] == ["dark", "light"]
    for row, expected in zip(found["results"], logits, strict=True):
        assert row["class"] == found["classes"][int(expected.argmax())]
        assert row["distance"] == pytest.approx(-float(expected.max()), rel=1e-3)
        assert row["probability"] == pytest.approx(float(expected.softmax(dim=0).max()), abs=1e-3)
        assert row["none_of_these"] == (row["distance"] > found["threshold"])


def test_reject_marks_what_is_none_of_these(meta_lora: str, folders: tuple[Path, Path]):
    support, query = folders
    plain = answer("classify", meta_lora, "--support", support, "--query", query)["results"]
    marked = answer("classify", meta_lora, "--support", support, "--query", query, "--reject")["results"]
    assert [row["class"] for row in marked] == [None if row["none_of_these"] else row["class"] for row in plain]
    assert [row["none_of_these"] for row in marked] == [True, False, False]
    table = run("classify", meta_lora, "--support", support, "--query", query, "--reject").stdout
    assert "none of these" in table
    assert "probability" in table
    assert "none of these" not in run("classify", meta_lora, "--support", support, "--query", query).stdout


def test_one_image_and_another_temperature(meta_lora: str, folders: tuple[Path, Path]):
    support, query = folders
    (row,) = answer("classify", meta_lora, "--support", support, "--query", query / "dark2.png")["results"]
    arguments = ("--support", support, "--query", query / "dark2.png", "--temperature", 0.001)
    (flat,) = answer("classify", meta_lora, *arguments)["results"]
    assert (row["file"], row["class"], flat["distance"]) == ("dark2.png", "dark", row["distance"])
    assert 0.5 <= flat["probability"] < 0.6 < row["probability"]


def test_a_photograph_is_classified_as_it_is_shown(meta_lora: str, folders: tuple[Path, Path]):
    support, query = folders
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.random.default_rng(7).integers(0, 255, (30, 44, 3), np.uint8)).save(query / "turned.jpg", exif=exif)
    Image.open(query / "turned.jpg").transpose(Image.Transpose.ROTATE_270).save(query / "upright.png")
    Image.open(query / "turned.jpg").save(query / "lying.png")
    found = answer("classify", meta_lora, "--support", support, "--query", query)["results"]
    rows = {row.pop("file"): row for row in found}
    assert rows["turned.jpg"] == rows["upright.png"] != rows["lying.png"]


def test_what_cannot_be_classified_is_one_line(meta_lora: str, folders: tuple[Path, Path], tmp_path: Path):
    support, query = folders
    (tmp_path / "empty").mkdir()
    save(tmp_path / "one" / "a" / "a.png", 0, 0)
    save(tmp_path / "single" / "a" / "a.png", 0, 0)
    save(tmp_path / "single" / "b" / "b.png", 0, 190)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"x")
    for arguments, message in (
        ((tmp_path / "none", query), "no such file or folder"),
        ((query / "dark2.png", query), "--support takes a folder"),
        ((tmp_path / "empty", query), "no class folders with images"),
        ((tmp_path / "one", query), "one class only"),
        ((support, tmp_path / "empty"), "no images in it"),
        ((support, tmp_path / "bad"), "x.png does not decode"),
        ((tmp_path / "single", query, "--reject"), "every class of --support"),
        ((support, "s3://bucket/images"), "only a batch job reads images from there; add --output"),
    ):
        done = run("classify", meta_lora, "--support", arguments[0], "--query", *arguments[1:])
        assert isinstance(done.exception, DataError)
        assert message in str(done.exception)
    found = answer("classify", meta_lora, "--support", tmp_path / "single", "--query", query)
    assert (found["threshold"], found["results"][0]["none_of_these"]) == (None, None)


def test_a_key_is_shown_once(tmp_path: Path):
    keys = tmp_path / "keys.json"
    secret = run("serve", "key", "add", "ann", "--keys", keys, "--max-tasks", 3).stdout.strip()
    assert find_key(read_keys(keys), secret)
    other = answer("serve", "key", "add", "bob", "--keys", keys)
    assert find_key(read_keys(keys), other["key"]).name == "bob"  # type: ignore[union-attr]
    listed = run("serve", "key", "ls", "--keys", keys).stdout
    assert "name ann" in listed
    assert secret not in listed
    assert read_keys(keys)[0].sha256 not in listed
    assert [row["tasks"] for row in answer("serve", "key", "ls", "--keys", keys)] == [3, 100]
    assert run("serve", "key", "rm", "ann", "--keys", keys).stdout == "removed ann\n"
    assert find_key(read_keys(keys), secret) is None


@pytest.mark.parametrize("package", ["fastapi", "python_multipart"])
def test_without_the_packages_of_serving_there_is_a_line(package: str):
    arguments = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['lr-ray', 'serve', '.']"
    code = f"{arguments}; from lr_ray.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("lr-ray: serving needs a package that is not installed")
    assert done.stderr.count("\n") == 1
