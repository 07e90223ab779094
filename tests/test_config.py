import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from lr_ray.config import ExperimentConfig, load_config
from lr_ray.errors import ConfigError
from lr_ray.fewshot.episodes import EpisodeShape
from lr_ray.fewshot.protocol import VaryingShape

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SHAPE_KEYS = "n_way, n_shot, n_query; or ways, max_query, max_support, max_support_per_class"
VIEW_KEYS = "roll, flip, affine, crop, thickness, blur, colour, negative, noise"
TOP_KEYS = (
    "name, output, adapters, synthetic, metric_synthetic, relations, seed, backbone, data, tuning, inversion, "
    "metric_inversion, training, evaluation, ray, tracking"
)

Load = Callable[..., ExperimentConfig]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load(text, *overrides)` writes `exp.yaml` into the working directory and loads it."""
    monkeypatch.chdir(tmp_path)

    def write_and_load(text: str, *overrides: str) -> ExperimentConfig:
        Path("exp.yaml").write_text(text, encoding="utf-8")
        return load_config("exp.yaml", overrides)

    return write_and_load


def message_of(load: Load, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path: Path):
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolved_round_trips(path: Path):
    config = load_config(path)
    resolved = config.resolved()
    assert ExperimentConfig.model_validate(resolved) == config
    assert ExperimentConfig.model_validate(yaml.safe_load(yaml.safe_dump(resolved))) == config


def test_there_are_configs():
    assert {"demo", "cifar-fs"} <= {path.stem for path in CONFIGS}


def test_a_config_is_immutable(load: Load):
    with pytest.raises(ValidationError, match="frozen"):
        load("seed: 1").seed = 2


def test_the_name_defaults_to_the_file_and_the_output_to_the_name(load: Load, tmp_path: Path):
    config = load("seed: 1")
    assert config.name == "exp"
    assert config.output_root == str(tmp_path / "runs" / "exp")


def test_the_folders_of_a_run_lie_in_its_output(load: Load):
    config = load("output: s3://bucket/run/")
    assert config.adapters_root == "s3://bucket/run/adapters"
    assert config.synthetic_root == "s3://bucket/run/synthetic"
    assert config.meta_lora_root == "s3://bucket/run/meta_lora"
    assert config.oracle_root == "s3://bucket/run/oracle"


def test_the_metric_is_learnt_from_the_images_to_train_on_or_from_others(load: Load):
    config = load("name: a\noutput: /a\n")
    assert config.for_metric is config
    assert "metric_inversion" not in config.resolved()
    assert "metric_synthetic" not in config.resolved()
    config = load("name: a\noutput: /a\nmetric_inversion: {canvas: strokes}\n")
    assert config.for_metric.inversion.canvas == "strokes"
    assert config.for_metric.synthetic_root == "/a/metric_synthetic"
    assert config.for_metric.for_metric.synthetic_root == "/a/metric_synthetic"
    named = load("name: a\nmetric_synthetic: /b\nmetric_inversion: {}\n")
    assert named.for_metric.synthetic_root == "/b"
    assert "metric_synthetic is a folder for the images of metric_inversion" in message_of(load, "metric_synthetic: /b")


def test_named_folders_replace_those_of_the_output(load: Load):
    config = load("{output: s3://bucket/run, adapters: s3://hub/loras, synthetic: s3://hub/images}")
    assert config.adapters_root == "s3://hub/loras"
    assert config.synthetic_root == "s3://hub/images"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", ["seed"], 7),
        ("name=other", ["name"], "other"),
        ("inversion.num_steps=3", ["inversion", "num_steps"], 3),
        ("inversion.prior=null", ["inversion", "prior"], None),
        ("inversion.views.flip=false", ["inversion", "views", "flip"], False),
        ("inversion.keep_ratios={3: 0.5}", ["inversion", "keep_ratios"], {3: 0.5}),
        ("training.schedule.highest=1e-3", ["training", "schedule", "highest"], 0.001),
        ("training.augmentation.crop=0.25", ["training", "augmentation", "crop"], 0.25),
        ("evaluation.methods=[nn, 'loras-avg:2']", ["evaluation", "methods"], ("nn", "loras-avg:2")),
        ("data.test={source: digits}", ["data", "test", "source"], "digits"),
        ("data.test.source=digits", ["data", "test", "source"], "digits"),
        ("backbone.name=a=b", ["backbone", "name"], "a=b"),
    ],
)
def test_overrides(load: Load, override: str, path: list[str], value: object):
    found: object = load("seed: 1", override)
    for attribute in path:
        found = getattr(found, attribute)
    assert found == value
    assert type(found) is type(value)


def test_an_override_keeps_the_rest_of_its_section(load: Load):
    config = load("inversion: {num_steps: 5, batch_size: 6}", "inversion.num_steps=7")
    assert (config.inversion.num_steps, config.inversion.batch_size) == (7, 6)


def test_the_last_override_wins(load: Load):
    assert load("seed: 1", "seed=2", "seed=3").seed == 3


def test_an_exponent_without_a_point_is_a_number(load: Load):
    assert load("training: {schedule: {highest: 5e-4}}").training.schedule.highest == 5e-4


@pytest.mark.parametrize(
    ("text", "key", "allowed"),
    [
        ("sede: 1", "sede", TOP_KEYS),
        ("data: {tset: {source: digits}}", "data.tset", "tune, validation, test"),
        ("data: {test: {source: digits, calsses: [a]}}", "data.test.calsses", "source, root, classes"),
        ("training: {augmentation: {flop: true}}", "training.augmentation.flop", VIEW_KEYS),
        ("evaluation: {shapes: [{n_way: 5}, {n_wya: 5}]}", "evaluation.shapes.1.n_wya", SHAPE_KEYS),
        ("evaluation: {shapes: [{ways: [5, 9], n_shot: 1}]}", "evaluation.shapes.0.n_shot", SHAPE_KEYS),
    ],
)
def test_an_unknown_key_is_named_with_what_is_allowed(load: Load, text: str, key: str, allowed: str):
    assert message_of(load, text) == f"config exp.yaml: unknown key {key!r}; allowed there: {allowed}"


def test_a_section_with_nothing_below_it_is_the_defaults(load: Load):
    assert load("data:\ntraining:\nseed: 1").resolved() == load("seed: 1").resolved()


def test_an_unknown_key_in_an_override_is_named(load: Load):
    message = message_of(load, "seed: 1", "ray.num_cpu=2")
    assert "unknown key 'ray.num_cpu'" in message
    assert "num_cpus, " in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: many", ["seed = 'many'", "integer"]),
        ("seed: -1", ["seed = -1", "greater than or equal to 0"]),
        ("seed: 20250101123000", ["seed = 20250101123000", "less than 4294967296"]),
        ("evaluation: {shapes: []}", ["evaluation.shapes = []", "at least 1 item"]),
        ("inversion: {betas: [0.5, 1.0]}", ["inversion.betas.1 = 1.0", "less than 1"]),
        ("inversion: {num_steps: 0}", ["inversion.num_steps = 0", "greater than 0"]),
        ("inversion: {num_steps: 2.5}", ["inversion.num_steps = 2.5", "integer"]),
        ("seed: true", ["seed = True", "true or false is not allowed here"]),
        ("training: {temperature: yes}", ["training.temperature = True", "not allowed here"]),
        ("inversion: 3", ["inversion = 3", "a section of `key: value` is needed"]),
        ("data: {test: {classes: [a]}}", ["data.test.source is missing"]),
        ("seed: 1\nseed: 2", ["'seed' is given twice", "line 2"]),
        ("data: {tune: {source: a}}\ninversion: {num_steps: 1, num_steps: 2}", ["'num_steps' is given twice"]),
        ("evaluation: {methods: []}", ["evaluation.methods = []", "at least 1 item"]),
        ("output: ''", ["output = ''", "at least 1 character"]),
        ("inversion: [" + "1, " * 90 + "1]", ["inversion = [1, 1", ", …: a section"]),
        ("training: {distance: manhattan}", ["training.distance = 'manhattan'", "euclidean"]),
        ("training: {keep_ratio: 0.5, augmentation: {crop: 0.2}}", ["keep_ratio", "augmentation.crop"]),
        ("evaluation: {shapes: [{n_way: 1}]}", ["evaluation.shapes.0.n_way = 1", "greater than 1"]),
        ("evaluation: {shapes: [{ways: [1, 9]}]}", ["evaluation.shapes.0.ways.0 = 1", "greater than 1"]),
        (
            "evaluation: {shapes: [{ways: [9, 5]}]}",
            ["evaluation.shapes.0 = ", "ways [9, 5]: the fewest are more than the most"],
        ),
        ("evaluation: {shapes: [{max_support: 30}]}", ["max_support 30 is less than an image for each of 50 ways; raise it"]),
        ("evaluation: {shapes: [meta-data]}", ["evaluation.shapes.0 = 'meta-data'", "n_way, n_shot and n_query, meta-dataset"]),
        ("evaluation: {shapes: [5]}", ["evaluation.shapes.0 = 5", "a section of"]),
        ("training: {num_workers: 2}", ["episodes_per_step 1", "num_workers 2"]),
        ("{seed: many, inversion: {num_steps: 0}}", ["seed = 'many'", "(and 1 more)"]),
    ],
)
def test_a_value_that_is_not_allowed_is_named(load: Load, text: str, parts: list[str]):
    message = message_of(load, text)
    assert message.startswith("config exp.yaml: ")
    assert [part for part in parts if part not in message] == []


def test_shapes_may_be_fixed_or_vary(load: Load):
    text = "evaluation: {shapes: [meta-dataset, {n_shot: 5}, {}, {ways: [5, 9]}]}"
    varying, *others = load(text).evaluation.shapes
    assert [varying, *others] == [VaryingShape(), EpisodeShape(n_shot=5), EpisodeShape(), VaryingShape(ways=(5, 9))]
    assert load("{}", "evaluation.shapes=[meta-dataset]").evaluation.shapes == (varying,)
    resolved = load(text).resolved()
    assert ExperimentConfig.model_validate(json.loads(json.dumps(resolved))).evaluation == load(text).evaluation
    names = [shape.name for shape in (varying, *others)]
    assert names[0::3] == ["varying-way varying-shot", "varying-way varying-shot (ways 5-9)"]
    assert names[1:3] == ["5-way 5-shot", "5-way 1-shot"]


def test_a_missing_file():
    with pytest.raises(ConfigError, match=r"config no/such\.yaml: .*No such file.*configs/demo\.yaml"):
        load_config("no/such.yaml")


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- a", "list"), ("seed", "str")])
def test_not_a_mapping(load: Load, text: str, kind: str):
    assert message_of(load, text) == f"config exp.yaml: a mapping is needed at the top, not {kind}"


@pytest.mark.parametrize("text", ["seed: [", "name: 2024-99-99", "a: !!python/name:os.system x"])
def test_not_yaml(load: Load, text: str):
    assert message_of(load, text).startswith("config exp.yaml: ")


def test_not_text(tmp_path: Path):
    (tmp_path / "exp.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="utf-8"):
        load_config(tmp_path / "exp.yaml")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("inversion.num_steps", "expected section.key=value, such as inversion.num_steps=200"),
        ("=3", "expected section.key=value, such as inversion.num_steps=200"),
        ("seed.x=3", "seed is a value, not a section"),
        ("seed=[", "the value is not YAML"),
        ("name=2024-99-99", "the value is not YAML"),
    ],
)
def test_a_bad_override(load: Load, override: str, reason: str):
    assert message_of(load, "seed: 1", override).startswith(f"--set {override!r}: {reason}")


def test_an_override_below_a_section_that_is_empty(load: Load):
    config = load("inversion:\ndata:\n  tune:", "inversion.num_steps=3", "data.tune.source=digits")
    assert config.inversion.num_steps == 3
    assert config.data.tune is not None
    assert config.data.tune.source == "digits"


@pytest.mark.parametrize("share", ["75", "-3", "0"])
def test_a_keep_ratio_that_is_no_share(load: Load, share: str):
    assert "keep_ratios.6" in message_of(load, f"inversion: {{keep_ratios: {{6: {share}}}}}")


def test_local_paths_become_absolute(load: Load, tmp_path: Path):
    config = load(
        "{output: out, adapters: loras, synthetic: images, backbone: {weights: w.safetensors},"
        " data: {tune: {source: a.parquet, classes: [x]}, validation: {source: ../b}, test: {source: /c}}}"
    )
    assert config.output == str(tmp_path / "out")
    assert config.adapters == str(tmp_path / "loras")
    assert config.synthetic == str(tmp_path / "images")
    assert config.backbone.weights == str(tmp_path / "w.safetensors")
    sections = (config.data.tune, config.data.validation, config.data.test)
    assert [data and Path(data.source).resolve() for data in sections] == [
        tmp_path / "a.parquet",
        tmp_path.parent / "b",
        Path("/c"),
    ]
    assert config.data.tune
    assert config.data.tune.classes == ("x",)


def test_home_is_expanded(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load("output: ~/out").output == str(tmp_path / "home" / "out")


def test_uris_and_embedded_data_stay(load: Load):
    config = load("{output: s3://bucket/out, adapters: file:///loras, data: {tune: {source: glyphs}, test: {source: digits}}}")
    assert (config.output, config.adapters) == ("s3://bucket/out", "file:///loras")
    assert config.data.tune
    assert config.data.test
    assert (config.data.tune.source, config.data.test.source) == ("glyphs", "digits")


def test_paths_that_are_not_given_stay_none(load: Load):
    config = load("seed: 1")
    assert config.adapters is config.synthetic is config.backbone.weights is None
    assert config.data.tune is config.data.validation is config.data.test is None


def test_classes_may_be_one_text(load: Load):
    config = load("data: {test: {source: glyphs, classes: 'greek/*,0:30'}}")
    assert config.data.test
    assert config.data.test.classes == ("greek/*", "0:30")


@pytest.mark.parametrize("override", ["data.test.classes=[6:10, 3]", "data.test.classes='6:10,3'"])
def test_ranges_and_numbers_are_classes(override: str):
    config = load_config(Path(__file__).parents[1] / "configs" / "demo.yaml", ["data.test.source=digits", override])
    assert config.data.test is not None
    assert config.data.test.classes == ("6:10", "3")


def test_numbers_are_those_of_yaml_1_2():
    overrides = ["training.schedule.highest=1e-3", "training.init_scale=.5", "seed=007", "training.temperature=2."]
    config = load_config(Path(__file__).parents[1] / "configs" / "demo.yaml", overrides)
    assert config.training.schedule.highest == 1e-3
    assert (config.training.init_scale, config.seed, config.training.temperature) == (0.5, 7, 2.0)
