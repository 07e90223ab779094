"""The bar of adapters from the wild: a market of 30, ranks 2 to 16, five formats, three damaged, through the whole job."""

import json
from pathlib import Path
from typing import Any

import pytest
from lr_ray.cli.main import app
from typer.testing import CliRunner, Result

from lr_ray.config import ExperimentConfig
from lr_ray.errors import AdapterError, ConfigError
from lr_ray.runtime.inversion import invert_library
from lr_ray.runtime.inversion_plan import plan_inversion
from lr_ray.runtime.market import make_market
from lr_ray.storage.adapters import list_adapters, read_adapter, with_digest, write_adapter
from lr_ray.storage.synthetic import read_rows
from tests.jobs import QUIET, tiny

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["library", *arguments] if arguments[0] in ("sample", "add", "check", "ls") else [*arguments]
    )


def answer(*arguments: str, code: int = 0) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


@pytest.mark.slow
def test_thirty_strangers_adapters_in_one_go(tmp_path: Path):
    config = tiny(tmp_path)
    tuning = config.tuning.model_copy(update={"num_adapters": 30})
    inversion = config.inversion.model_copy(update={"num_steps": 2, "images_per_class": 3, "keep_ratios": {}})
    evaluation = config.evaluation.model_copy(update={"methods": ("nn", "loras-avg", "recycle")})
    config = config.model_copy(update={"tuning": tuning, "inversion": inversion, "evaluation": evaluation})
    (path := tmp_path / "market.yaml").write_text(json.dumps(config.resolved()))
    where, shared = str(tmp_path / "library"), str(tmp_path / "shared")

    assert len(answer("sample", shared, "-c", str(path), "--num-damaged", "3")) == 30
    added = answer("add", where, shared, "-c", str(path), code=2)
    assert (len(added["taken"]), len(added["refused"])) == (27, 3)
    reasons = ("no whole safetensors file", "every lora_B is zero: it was never trained", "has NaN or infinite weights")
    assert [sum(reason in why for why in added["refused"]) for reason in reasons] == [1, 1, 1]
    entries = answer("ls", where)
    assert {rank for entry in entries for rank in entry["ranks"]} == {2, 4, 8, 16}
    assert {entry["format"] for entry in entries} == {"lora", "kohya"}
    assert all(check["verdict"] != "failed" for row in answer("check", where) for check in row["checks"])

    group = ("-c", str(path), "--adapters", added["root"])
    assert len(answer("invert", *group)["uris"]) == 27
    answer("train", *group)
    rows = answer("eval", *group)
    assert [row["method"] for row in rows] == ["nn", "loras-avg", "recycle"]
    assert all(0 < row["accuracy"] <= 100 for row in rows)
    assert answer("sample", shared, "-c", str(path), "--num-damaged", "3")  # a rerun tunes nothing again
    assert answer("add", where, shared, "-c", str(path), code=2)["present"] == added["taken"]


def test_more_damaged_than_there_are(tiny_experiment: ExperimentConfig, tmp_path: Path):
    with pytest.raises(ConfigError, match="--num-damaged 4: there are 3 adapters"):
        make_market(str(tmp_path / "shared"), tiny_experiment, QUIET, num_damaged=4)


# Of what a mixed library has


def test_adapters_without_a_head_are_left_out_of_the_inversion(library: ExperimentConfig):
    folders = list_adapters(library.adapters_root)
    headless(folders[0])
    plan = plan_inversion(library)
    assert plan.left_out == 1
    assert {item.adapter_folder for item in plan.items} == set(folders[1:])


def test_a_library_without_any_head_is_one_line(library: ExperimentConfig):
    for folder in list_adapters(library.adapters_root):
        headless(folder)
    with pytest.raises(AdapterError, match="none of 3 has a head with classes; there is nothing to invert"):
        plan_inversion(library)


def headless(folder: str) -> None:
    adapter = read_adapter(folder)
    spec = {name: getattr(adapter.spec, name) for name in ("adapter_id", "digest", "backbone", "backbone_digest")}
    bare = type(adapter)(spec=type(adapter.spec)(**spec, class_names=()), modules=adapter.modules)
    write_adapter(folder, with_digest(bare), inputs={}, facts={})


def test_only_the_classes_that_were_asked_for_are_inverted(library: ExperimentConfig):
    everything = {item.uri for item in plan_inversion(library).items}
    first = read_adapter(list_adapters(library.adapters_root)[0]).spec.class_names[0]
    for asked, expected in (("0:2", (0, 1)), (first, (0,))):
        inversion = library.inversion.model_copy(update={"classes": (asked,)})
        some = library.model_copy(update={"inversion": inversion, "synthetic": f"{library.output_root}/some-{len(expected)}"})
        plan = plan_inversion(some)
        assert plan.items[0].classes == expected
        assert not everything & {item.uri.rsplit("/", 1)[-1] for item in plan.items}
        assert len(plan.items) + plan.left_out == 3
    report = invert_library(some, QUIET, strict=True)
    rows = read_rows(report.uris[0])
    assert set(rows["class_name"].to_pylist()) == {first}
    assert len(rows["teacher_logits"][0].as_py()) == 3  # the teacher still knows all of its classes


def test_classes_that_nobody_has_are_one_line(library: ExperimentConfig):
    inversion = library.inversion.model_copy(update={"classes": ("unicorn",)})
    with pytest.raises(AdapterError, match=r"none of 3 has a class that inversion\.classes unicorn means"):
        plan_inversion(library.model_copy(update={"inversion": inversion}))
    assert len(plan_inversion(library).items) == 3  # the folder was not taken for what cannot be


def test_a_file_in_the_folders_place_is_found_before_anything_is_tuned(tmp_path: Path):
    (tmp_path / "shared").write_bytes(b"")
    with pytest.raises(ConfigError, match="shared is a file; give a folder to write the adapters into"):
        make_market(str(tmp_path / "shared"), tiny(tmp_path), QUIET)
    assert not list((tmp_path).glob("**/market"))
