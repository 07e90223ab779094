"""The whole job with everything on S3, over a network that fails, is the job on local disk."""

import json
from collections.abc import Iterator
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import pytest
from lr_ray.cli.main import app, main
from typer.testing import CliRunner

from lr_ray.config import load_config
from lr_ray.errors import StorageError
from lr_ray.report.progress import Reporter
from lr_ray.runtime.training import train_meta_lora
from lr_ray.storage.filesystem import list_files, read_bytes
from tests.s3 import Fault, FaultyProxy

FAULTY: list[Fault | None] = [
    *[None] * 14,
    "truncated",
    *[None] * 14,
    "slow down",
    *[None] * 14,
    "reset",
    *[None] * 14,
    "lost answer",
    *[None] * 14,
    "server error",
]


@pytest.mark.slow
def test_whole_job_on_s3(local_run: tuple[Path, list[dict[str, Any]]], bucket: str, s3: FaultyProxy) -> None:
    path, local_rows = local_run
    local_root, root = path.parent / "run", f"{bucket}/runs/tiny"
    methods = ["nn", "loras-avg", "recycle"]
    command = ["run", str(path), "--output", root, "--set", f"evaluation.methods=[{','.join(methods)}]", "--json"]
    s3.set_faults(cycle(FAULTY))

    first = CliRunner().invoke(app, command, catch_exceptions=False)

    s3.set_faults(())
    expected = [measured(row) for row in local_rows if row["method"] in methods]
    assert [measured(row) for row in json.loads(first.stdout)] == expected
    assert json.loads(read_bytes(f"{root}/results.json")) == json.loads(first.stdout)
    files = list_files(root, suffix="")
    made = [name for name in files if name.endswith((".parquet", ".safetensors")) and "/training/" not in name]
    assert {name.split("/")[0] for name in made} == {"adapters", "synthetic", "relations", "meta_lora", "evaluation"}
    made = [name for name in made if not name.startswith("evaluation/")]  # which hold times
    assert all(read_bytes(f"{root}/{name}") == (local_root / name).read_bytes() for name in made)
    assert {"report.html", "contact_sheet.png", "meta_lora/lr_ray.json"} <= set(files)
    assert not [name for name in files if name.endswith(".tmp")]
    s3.set_faults(())

    second = CliRunner().invoke(app, command, catch_exceptions=False)

    assert second.stdout == first.stdout
    changes = [request for request in s3.requests if not request.startswith(("GET", "HEAD"))]
    assert sorted(request.rsplit("/")[-1] for request in changes) == [
        "contact_sheet.png",
        "report.html",
        "results.csv",
        "results.md",
        "results.tex",
    ]


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """A row of results without what differs from run to run."""
    costs = ("seconds", "images_per_s", "episode_ms", "peak_memory_mib")
    return {key: value for key, value in row.items() if key not in costs}


@pytest.mark.parametrize(
    ("fault", "message"), [("forbidden", "Access Denied; check the rights on it"), (None, "there is no bucket 'absent-bucket'")]
)
def test_inversion_into_a_bad_bucket_fails_before_any_work(
    local_run: tuple[Path, list[dict[str, Any]]],
    bucket: str,
    s3: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Fault | None,
    message: str,
) -> None:
    path, _ = local_run
    root = bucket if fault else "s3://absent-bucket"
    adapters = str(path.parent / "run" / "adapters")
    s3.set_faults(cycle([fault]))
    monkeypatch.setattr(
        "sys.argv", ["lr-ray", "invert", "-c", str(path), "--adapters", adapters, "--synthetic", f"{root}/synthetic"]
    )
    monkeypatch.setattr("lr_ray.runtime.inversion.actor_pool", lambda *_: pytest.fail("work has started"))

    with pytest.raises(SystemExit) as stopped:
        main()

    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lr-ray: cannot read {root}/synthetic/claim.json: {message}")


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_training(
    local_run: tuple[Path, list[dict[str, Any]]], bucket: str, s3: FaultyProxy
) -> None:
    """When rights are lost midway: one line, and not as many attempts as a lost worker gets."""
    path, _ = local_run
    folders = {name: str(path.parent / "run" / name) for name in ("adapters", "synthetic", "relations")}
    config = load_config(path, [f"output={bucket}", *(f"{name}={folder}" for name, folder in folders.items())])

    def faults() -> Iterator[Fault | None]:
        while not any(request.startswith("PUT") and "/state." in request for request in s3.requests):
            yield None
        yield from repeat("forbidden")

    s3.set_faults(faults())

    with pytest.raises(
        StorageError,
        match=rf"^cannot write (a checkpoint )?to {bucket}/meta_lora/training: (Access Denied|Forbidden); check the rights",
    ):
        train_meta_lora(config, Reporter(quiet=True))

    assert len([request for request in s3.requests if request.startswith("PUT") and "/state." in request]) <= 2
