"""`--fast auto`: what it tries, what it takes, and that a run keeps to it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from lr_ray.cli.main import app
from typer.testing import CliRunner

from lr_ray.config import ExperimentConfig
from lr_ray.errors import BackboneError, ClusterError, InversionError, StorageError
from lr_ray.runtime import probe
from lr_ray.runtime.barrier import Barrier
from lr_ray.runtime.inversion import invert_library
from lr_ray.runtime.probe import Arrangement, choose_by_probe
from lr_ray.vit.backbone import Precision
from tests.jobs import QUIET, changed

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_TRIAL_S", 0.05)


def test_it_measures_and_keeps_to_what_it_chose(library: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose_by_probe(library, QUIET)
    stored = json.loads(Path(library.output_root, "fast.json").read_text())
    assert chosen.inversion.batch_size == stored["chosen"]["inversion"]["batch_size"]
    assert chosen.inversion.precision in ("bf16", "fp32")
    assert {row.get("precision") for row in stored["tried"]} == {"bf16", "fp32", None}
    assert all(row["images_per_s"] > 0 for row in stored["tried"])
    most = library.tuning.n_way * library.inversion.images_per_class
    assert max(row["batch_size"] for row in stored["tried"] if "actors" in row) == most

    monkeypatch.setattr(probe, "_probe", lambda *_: pytest.fail("tried again"))
    assert choose_by_probe(library, QUIET) == chosen


def test_the_smallest_batch_and_the_arrangement_as_configured_that_are_as_fast(
    library: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speeds(
        _config: ExperimentConfig, arrangement: Arrangement, variants: tuple[tuple[Precision, int], ...]
    ) -> dict[tuple[Precision, int], float]:
        best = 101.0 if arrangement.cpus_per_actor == 1 else 100.0
        return {(name, size): (best if size >= 20 else 50.0) * (name == "fp32") for name, size in variants}

    monkeypatch.setattr(probe, "_speeds", speeds)
    large = changed(library, inversion={"images_per_class": 50}, ray={"cpus_per_actor": 2})
    chosen = choose_by_probe(large, QUIET)
    assert chosen.inversion.precision == "fp32"
    assert chosen.inversion.batch_size == 20
    assert chosen.ray.cpus_per_actor == 2


@pytest.mark.parametrize(
    ("node", "given", "expected"),
    [
        ({"CPU": 16.0, "GPU": 0.0}, {}, [(16, 1, 0.0), (1, 16, 0.0)]),
        ({"CPU": 16.0, "GPU": 0.0}, {"max_actors": 1}, [(1, 1, 0.0), (1, 16, 0.0)]),
        ({"CPU": 8.0, "GPU": 4.0}, {"num_gpus_per_actor": 1.0}, [(1, 1, 1.0), (2, 1, 0.5)]),
        ({"CPU": 8.0, "GPU": 1.0}, {"num_gpus_per_actor": 1.0, "max_actors": 2}, [(1, 1, 1.0), (2, 1, 0.5)]),
    ],
    ids=["processors", "one actor", "two processors a GPU", "two actors"],
)
def test_arrangements_are_such_as_the_job_can_have(
    library: ExperimentConfig,
    monkeypatch: pytest.MonkeyPatch,
    node: dict[str, float],
    given: dict[str, float],
    expected: list[tuple[int, int, float]],
) -> None:
    monkeypatch.setattr(probe, "_largest_node", lambda: node)
    found = probe._arrangements(changed(library, ray={"cpus_per_actor": 1, **given}))
    assert [(a.actors, a.cpus_per_actor, a.num_gpus_per_actor) for a in found] == expected


def test_a_cluster_without_processors_yet(library: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_largest_node", lambda: {"CPU": 0.0, "GPU": 0.0})
    with pytest.raises(ClusterError, match="no machine of this Ray has a processor yet"):
        probe._arrangements(library)


def test_actors_are_kept_to_on_the_same_machine_alone(library: ExperimentConfig) -> None:
    chosen = {"inversion": {"precision": "fp32", "batch_size": 3}, "ray": {"cpus_per_actor": 64, "num_gpus_per_actor": 0.0}}
    path = Path(library.output_root, "fast.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"chosen": chosen, "machine": {"CPU": 64.0, "GPU": 0.0}}))
    found = choose_by_probe(library, QUIET)
    assert (found.inversion.batch_size, found.inversion.precision) == (3, "fp32")
    assert found.ray == library.ray


@pytest.mark.parametrize("content", ["", "{", "[]", '{"chosen": {"inversion": 5}}', '{"chosen": {"inversion": {}, "ray": {}}}'])
def test_a_damaged_choice_is_named(library: ExperimentConfig, content: str) -> None:
    path = Path(library.output_root, "fast.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with pytest.raises(StorageError, match=r"fast\.json is damaged; choose another --output, or delete it and the images"):
        choose_by_probe(library, QUIET)


def test_a_batch_that_memory_does_not_hold_counts_as_nothing(
    library: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tasks(_function: object, trials: list[Any], _config: object) -> Any:
        (variants,) = {trial.variants for trial in trials}
        for trial in trials:
            too_large = variants[-1][1] > most
            yield trial, ClusterError("out of memory") if too_large else [float(size) for _, size in variants]

    monkeypatch.setattr(probe, "map_tasks", tasks)
    most = 10
    chosen = choose_by_probe(changed(library, inversion={"images_per_class": 50}), QUIET)
    assert chosen.inversion.batch_size == 10
    most = 5
    other = library.model_copy(update={"output": f"{library.output_root}/other"})
    with pytest.raises(ClusterError, match="no batch of 10 images fits"):
        choose_by_probe(changed(other, inversion={"images_per_class": 50}), QUIET)


@pytest.mark.slow
def test_images_that_were_begun_without_it(library: ExperimentConfig) -> None:
    invert_library(library, QUIET)
    with pytest.raises(StorageError, match="was begun without --fast"):
        choose_by_probe(library, QUIET)
    assert not Path(library.output_root, "fast.json").exists()


def test_a_backbone_that_cannot_be_loaded(library: ExperimentConfig) -> None:
    with pytest.raises(BackboneError):
        choose_by_probe(changed(library, backbone={"name": "vit_none"}), QUIET)
    assert not Path(library.output_root, "fast.json").exists()


@pytest.mark.slow
def test_the_command(library: ExperimentConfig, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(library.model_dump(mode="json", exclude_defaults=True)))
    found = CliRunner().invoke(app, ["invert", "-c", str(path), "--fast", "auto", "--json"])
    assert found.exit_code == 0, found.output
    assert Path(library.output_root, "fast.json").exists()
    assert json.loads(found.stdout)["uris"]
    other = CliRunner().invoke(app, ["invert", "-c", str(path), "--fast", "quick"])
    assert other.exit_code == 2
    assert "auto" in other.output


def test_nobody_passes_the_barrier_before_all_are_there():
    async def meet() -> None:
        barrier = Barrier(2, timeout_s=60)
        for _ in range(2):
            first = asyncio.create_task(barrier.wait())
            await asyncio.sleep(0)
            assert not first.done()
            assert await barrier.wait()
            assert await first

    asyncio.run(meet())


@pytest.mark.parametrize("lost", [False, True])
def test_nobody_waits_for_ever(lost: bool):
    async def wait_in_vain() -> None:
        barrier = Barrier(2, timeout_s=60 if lost else 0.01)
        waiting = asyncio.create_task(barrier.wait())
        await asyncio.sleep(0)
        if lost:
            await barrier.abort()
        assert not await waiting
        assert not await barrier.wait()

    asyncio.run(wait_in_vain())


@pytest.mark.slow
def test_actors_that_do_not_fit_at_once_are_an_error(library: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of one processor on two: the third begins when another ends."""
    monkeypatch.setattr(probe, "_TOGETHER_S", 3.0)
    three = Arrangement(actors=3, cpus_per_actor=1, num_gpus_per_actor=0.0)
    with pytest.raises(InversionError, match=r"3 actors did not all get to work at once; .* leave --fast out"):
        probe._speeds(library, three, (("fp32", 2),))
