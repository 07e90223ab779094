import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lr_ray.errors import StorageError
from lr_ray.storage import manifest
from lr_ray.storage.manifest import (
    CLAIM_NAME,
    MANIFEST_NAME,
    claim_folder,
    digest_of,
    read_manifest,
    versions,
    write_manifest,
)

INPUTS = {"seed": 0, "backbone": "tiny", "inversion": {"num_steps": 100, "betas": (0.5, 0.99)}, "files": ["a", "b"]}


def test_a_digest_is_of_the_json_with_sorted_keys():
    assert digest_of({"b": [1, 2], "a": None}) == hashlib.sha256(b'{"a": null, "b": [1, 2]}').hexdigest()


def test_a_digest_does_not_depend_on_the_order_of_keys():
    one, other = {"a": 1, "b": {"c": 2, "d": (3, 4)}}, {"b": {"d": [3, 4], "c": 2}, "a": 1}
    assert list(one) != list(other)
    assert digest_of(one) == digest_of(other)


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": 1, "b": None}, {"b": 1}, [1], {"a": [1]}])
def test_other_inputs_have_another_digest(other: Any):
    assert digest_of(other) != digest_of({"a": 1})


def test_a_digest_depends_on_the_order_of_a_list():
    assert digest_of([1, 2]) != digest_of([2, 1])


def test_a_manifest_is_read_as_written(tmp_path: Path):
    folder = str(tmp_path / "artefact")
    assert read_manifest(folder) is None
    write_manifest(folder, {"seed": 1}, {"accuracy": 0.5, "classes": ["α"]})
    assert read_manifest(folder) == {
        "digest": digest_of({"seed": 1}),
        "inputs": {"seed": 1},
        "accuracy": 0.5,
        "classes": ["α"],
        "versions": versions(),
    }


def test_a_manifest_is_readable_by_people(tmp_path: Path):
    write_manifest(str(tmp_path), {"name": "α"}, {})
    text = (tmp_path / MANIFEST_NAME).read_text(encoding="utf-8")
    assert '\n  "inputs": {\n    "name": "α"\n' in text


def test_versions_are_those_installed():
    import pyarrow
    import torch

    assert {"lr-ray", "torch", "timm", "ray"} <= versions().keys()
    assert "unknown" not in versions().values()
    assert versions()["pyarrow"] == pyarrow.__version__
    assert versions()["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize("content", [b"", b'{"digest": "ab', b"\xff\xfe\xfd"])
def test_a_damaged_manifest(tmp_path: Path, content: bytes):
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(StorageError, match=rf"manifest {tmp_path}/{MANIFEST_NAME} is damaged .*; delete it and run again"):
        read_manifest(str(tmp_path))


def claim(folder: Path, **changes: Any) -> bytes:
    """Claim with some inputs changed; returns what the folder then holds of claims."""
    claim_folder(str(folder), INPUTS | changes, config={"name": "tiny"})
    return (folder / CLAIM_NAME).read_bytes()


def test_the_first_claim_is_kept_with_its_config(tmp_path: Path):
    found = json.loads(claim(tmp_path / "new"))
    assert found["inputs"] == json.loads(json.dumps(INPUTS))
    assert found["config"] == {"name": "tiny"}
    assert found["versions"] == versions()


def test_the_same_claim_again_is_fine_and_changes_nothing(tmp_path: Path):
    before = claim(tmp_path)
    reordered = dict(reversed(INPUTS.items()))
    claim_folder(str(tmp_path), reordered, config={"name": "renamed"})
    assert (tmp_path / CLAIM_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "(seed was 0, now 1)"),
        ({"backbone": "großes"}, '(backbone was "tiny", now "großes")'),
        ({"inversion": {"num_steps": 5, "betas": (0.5, 0.99)}}, "(inversion.num_steps was 100, now 5)"),
        ({"inversion": {"num_steps": 100, "betas": (0.5, 0.9)}}, "(inversion.betas was [0.5, 0.99], now [0.5, 0.9])"),
        ({"added": True}, "(added was null, now true)"),
        ({"files": ["x" * 50]}, f'(files was ["a", "b"], now ["{"x" * 37}…)'),
        ({"seed": 1, "backbone": "b"}, '(backbone was "tiny", now "b"; seed was 0, now 1)'),
        (
            {"seed": 1, "backbone": "b", "files": [], "x": 1},
            '(backbone was "tiny", now "b"; files was ["a", "b"], now []; seed',
        ),
    ],
)
def test_another_claim_names_what_differs_and_changes_nothing(tmp_path: Path, changes: dict[str, Any], difference: str):
    before = claim(tmp_path)
    with pytest.raises(StorageError, match=r"which has no results yet; .*is no longer at work, delete .*claim.json$") as caught:
        claim(tmp_path, **changes)
    assert f"{tmp_path} is another run's {difference}" in str(caught.value)
    (tmp_path / "result").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        claim(tmp_path, **changes)
    assert f"{tmp_path} holds another run's results {difference}" in str(caught.value)
    assert "--output" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CLAIM_NAME, "result"]
    assert (tmp_path / CLAIM_NAME).read_bytes() == before


def test_of_two_that_claim_a_new_folder_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each has looked before either wrote."""
    before = claim(tmp_path)
    real, looks = manifest.read_if_there, iter([None])
    monkeypatch.setattr(manifest, "read_if_there", lambda uri: next(looks, real(uri)))
    with pytest.raises(StorageError, match=r"is another run's \(seed was 0, now 1\), which"):
        claim(tmp_path, seed=1)
    assert (tmp_path / CLAIM_NAME).read_bytes() == before


def test_many_differences_are_cut_short(tmp_path: Path):
    claim(tmp_path)
    with pytest.raises(StorageError, match=r"; …\), which has no results yet") as caught:
        claim(tmp_path, a=1, b=2, c=3, d=4)
    assert str(caught.value).count(" was ") == 3


@pytest.mark.parametrize("content", [b"", b'{"inputs": ', b"{}", b"[]"])
def test_a_damaged_claim(tmp_path: Path, content: bytes):
    (tmp_path / CLAIM_NAME).write_bytes(content)
    with pytest.raises(StorageError, match=rf"{tmp_path}/{CLAIM_NAME} is damaged"):
        claim(tmp_path)
    assert (tmp_path / CLAIM_NAME).read_bytes() == content
