import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from lr_ray.cli import main as cli
from lr_ray.cli.options import read_config
from lr_ray.cli.table import print_grid, print_results
from typer.testing import CliRunner

from lr_ray.errors import ClusterError

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")

OPTIONS = {
    "run": {"CONFIG", "--set", "--output", "-o", "--fast", "--cluster", "--up", "--json"},
    "demo": {"--set", "--output", "-o", "--json"},
    "tune": {"--config", "-c", "--set", "--data", "--classes", "--output", "-o", "--json"},
    "invert": {
        "--config", "-c", "--set", "--adapters", "--synthetic", "--output", "-o", "--strict", "--fast", "--cluster", "--up",
        "--json",
    },
    "train": {
        "--config", "-c", "--set", "--adapters", "--synthetic", "--output", "-o", "--oracle", "--joint",
        "--cluster", "--up", "--json",
    },
    "eval": {
        "--config", "-c", "--set", "--data", "--classes", "--adapters", "--output", "-o", "--method",
        "--cluster", "--up", "--json",
    },
    "classify": {"META_LORA", "--support", "--query", "--reject", "--temperature", "--output", "-o", "--json"},
    "export": {"META_LORA", "--format", "--to", "--json"},
    "push": {"META_LORA", "REPO_ID", "--format", "--private", "--dry-run", "--json"},
    "report": {"--config", "-c", "--set", "--synthetic", "--output", "-o", "--watch", "--json"},
    "ablate": {"GRID", "--cell", "--output", "-o", "--json"},
    "plan": {"--config", "-c", "--num-adapters", "--num-classes", "--set", "--json"},
    "fetch": set(),
    "serve": set(),
    "library": set(),
    "bench": set(),
    "cluster": set(),
}  # fmt: skip

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """`main(*arguments)` as the installed command does: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lr-ray", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else int(code is not None)), out, err

    return call


def command_of(name: str) -> Any:
    group: Any = typer.main.get_command(cli.app)
    return group.commands[name]


def test_help():
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert [name for name in OPTIONS if name not in result.stdout] == []


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command(command: str):
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_the_commands():
    group: Any = typer.main.get_command(cli.app)
    assert list(group.commands) == list(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_the_options_of_a_command(command: str):
    params = command_of(command).params
    found = [name for param in params for name in ([param.name.upper()] if is_argument(param) else param.opts)]
    assert set(found) == OPTIONS[command]
    assert [name for param in params for name in param.secondary_opts] == []


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("start", {"META_LORAS", "--host", "--port", "--tasks", "--keys", "--replicas", "--precision"}),
        (
            "build",
            {"META_LORAS", "--output", "-o", "--host", "--port", "--tasks", "--keys", "--replicas", "--precision"},
        ),
        ("key", set()),
    ],
)
def test_the_options_of_serve(command: str, options: set[str]):
    params = command_of("serve").commands[command].params
    assert {name for p in params for name in ([p.name.upper()] if is_argument(p) else p.opts)} == options
    assert all(p.help for p in params)


def is_argument(param: Any) -> bool:
    return param.param_type_name == "argument"


@pytest.mark.parametrize("command", OPTIONS)
def test_every_command_and_option_says_what_it_is_for(command: str):
    assert command_of(command).help
    for param in command_of(command).params:
        assert getattr(param, "help", None), param.name


def test_help_needs_neither_torch_nor_ray():
    """In an interpreter of its own: help is instant because the heavy libraries are imported by the commands."""
    code = (
        "import sys; from typer.testing import CliRunner; import lr_ray.cli.main as m; "
        "code = CliRunner().invoke(m.app, ['tune', '--help']).exit_code; "
        "heavy = {'torch', 'ray', 'timm', 'numpy', 'pyarrow', 'matplotlib', 'yaml'} & set(sys.modules); "
        "print(code, sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "0 []\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "-c", DEMO, "--set", "nonsense=1"], "unknown key 'nonsense'; allowed there: name, output"),
        (["tune", "-c", DEMO, "--set", "nonsense"], "--set 'nonsense': expected section.key=value"),
        (["tune", "-c", "missing.yaml"], "config missing.yaml: "),
        (["run", "missing.yaml"], "config missing.yaml: "),
        (["export", "missing", "--format", "onnx", "--to", "m.onnx"], "missing is no adapter: it has no adapter_config.json"),
        (["classify", "missing", "--support", ".", "--query", "."], "missing is no adapter: it has no adapter_config.json"),
        (["serve", "missing"], "missing is no adapter: it has no adapter_config.json"),
        (["serve", "start", "missing", "--host", "0.0.0.0"], "--host 0.0.0.0 is reached from other machines; add --keys FILE"),
        (["serve", "missing", "--keys", "/missing.json"], "keys /missing.json: "),
        (["serve", "key", "ls", "--keys", "missing.json"], "keys missing.json: "),
        (["serve", "key", "add", "A/B", "--keys", "missing.json"], "key name 'A/B': give 1 to 63 of a-z"),
        (["push", "missing", "me/x"], "missing is no adapter: it has no adapter_config.json"),
        (["push", "missing", "x"], "'x' is no repository of the hub"),
        (["run", DEMO, "--set", "seed=[\n"], "the value is not YAML"),
        (["demo", "--set", "tuning.n_way=1"], "tuning.n_way = 1: Input should be greater than 1"),
        (["invert", "-c", DEMO, "--set", "inversion.num_steps=few"], "inversion.num_steps = 'few'"),
        (["train", "-c", DEMO, "--set", "ray=4"], "ray = 4"),
        (["invert", "-c", DEMO, "--up"], "--up: no cluster to bring up; add --cluster"),
        (
            ["invert", "-c", DEMO, "--up", "--cluster", "http://127.0.0.1:8265"],
            "and --cluster http://127.0.0.1:8265 is an address",
        ),
        (["run", DEMO, "--cluster", "missing.yaml"], "cluster missing.yaml: "),
        (["run", DEMO, "--cluster", "ray://head:10001"], "a job is handed to the cluster's dashboard; give http://HOST:8265"),
        (["cluster", "up", "missing.yaml"], "cluster missing.yaml: "),
        (["cluster", "down", DEMO], "it lacks provider.type; allowed are aws, gcp, azure"),
        (["library", "show", "missing", "x"], "no adapters are called 'x'; it holds 0"),
        (["library", "rm", "missing", "x"], "no adapters are called 'x'; it holds 0"),
        (["train", "-c", DEMO, "--oracle", "--joint"], "--oracle and --joint are two trainings; give one of them"),
        (
            ["eval", "-c", DEMO, "--set", "data.test.color=1"],
            "unknown key 'data.test.color'; allowed there: source, root, classes",
        ),
    ],
)
def test_an_error_of_the_user_is_one_line_and_exit_code_1(main: Main, arguments: list[str], message: str):
    code, out, err = main(*arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("lr-ray: ")
    assert message in err
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_the_installed_command():
    """As a user meets it: its own process, nothing but the line on stderr."""
    command = [str(Path(sys.executable).parent / "lr-ray"), "tune", "-c", DEMO, "--set", "nonsense=1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("lr-ray: config ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["tune"], ["nonsense"], ["run"], ["tune", "--nonsense"], ["export", "x"]])
def test_a_wrong_command_line_is_exit_code_2(main: Main, arguments: list[str]):
    code, out, err = main(*arguments)
    assert code == 2
    assert out == ""
    assert "Usage:" in err


def test_an_error_while_working_is_one_line(main: Main, monkeypatch: pytest.MonkeyPatch):
    def fail(*_args: object) -> None:
        raise ClusterError("no cluster at ray://x\nstart one")

    monkeypatch.setattr("lr_ray.runtime.tuning.tune_library", fail)
    assert main("tune", "-c", DEMO) == (1, "", "lr-ray: no cluster at ray://x start one\n")


@pytest.mark.parametrize("fault", [ValueError, RuntimeError, OSError, KeyError])
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, fault: type[Exception]):
    def fail(*_args: object) -> None:
        raise fault("a bug")

    monkeypatch.setattr("lr_ray.runtime.tuning.tune_library", fail)
    monkeypatch.setattr(sys, "argv", ["lr-ray", "tune", "-c", DEMO])
    with pytest.raises(fault, match="a bug") as caught:
        cli.main()
    assert caught.traceback[-1].name == "fail"


def test_json_is_all_that_is_printed(main: Main, monkeypatch: pytest.MonkeyPatch):
    manifest = {"adapter_id": "a", "class_names": ["α", "β"], "held_out_accuracy": 0.5, "digest": "x"}
    monkeypatch.setattr("lr_ray.runtime.tuning.tune_library", lambda _experiment, _progress: [manifest])
    code, out, err = main("tune", "-c", DEMO, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == [{"adapter_id": "a", "class_names": ["α", "β"], "held_out_accuracy": 0.5}]
    code, out, _ = main("tune", "-c", DEMO, "--output", "s3://bucket/run")
    assert (code, out) == (0, "1 adapters in s3://bucket/run/adapters, 50.0 % on images they did not see\n")


def test_methods_replace_those_of_the_config(main: Main, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def measure(experiment: Any, _progress: object) -> list[object]:
        seen.append(experiment.evaluation.methods)
        return []

    monkeypatch.setattr("lr_ray.runtime.evaluation.evaluate_methods", measure)
    code, out, _ = main("eval", "-c", DEMO, "--method", "nn", "--method", "loras-avg:2", "--json")
    assert (code, json.loads(out), seen) == (0, [], [("nn", "loras-avg:2")])


# ------------------------------------------------------------------------------------------------- flags and table


def read(**flags: Any) -> Any:
    return read_config(Path(DEMO), flags.pop("overrides", None), **flags)


def test_plain_flags_set_their_keys():
    config = read(output="s3://b/o", adapters="s3://b/a", synthetic="s3://b/s")
    assert (config.output, config.adapters, config.synthetic) == ("s3://b/o", "s3://b/a", "s3://b/s")


def test_plain_flags_win_over_set():
    assert read(overrides=["output=s3://b/set"], output="s3://b/flag").output == "s3://b/flag"


@pytest.mark.parametrize("value", ["a: b", "1", "null", "{x}", "#x", '"quoted"', "größe", "🙂", "a\\b"])
def test_a_flag_is_taken_literally(value: str):
    """Not as YAML, which would read a number, a mapping or a comment."""
    assert read(output=f"s3://b/{value}").output == f"s3://b/{value}"
    assert read(data=("test", None, value)).data.test.classes == (value,)


def test_data_alone_takes_all_its_classes():
    assert read(data=("test", "digits", None)).data.test.model_dump() == {"source": "digits", "root": None, "classes": None}


def test_classes_alone_keep_the_data():
    test = read(data=("test", None, "greek/*,6:10")).data.test
    assert (test.source, test.classes) == ("glyphs", ("greek/*", "6:10"))


def test_data_and_classes_leave_the_other_sections():
    config, untouched = read(data=("tune", "digits", "0:5")), read()
    assert (config.data.tune.source, config.data.tune.classes) == ("digits", ("0:5",))
    assert config.data.test == untouched.data.test


def test_the_table_shows_every_method_and_shape(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    common = {"dataset": "glyphs[greek/*,/x]", "n_way": 5, "ci95": 1.5, "episodes": 600, "episode_ms": 99.66}
    print_results(
        [
            common | {"method": "nn", "n_shot": 1, "accuracy": 61.25},
            common | {"method": "nn", "n_shot": 5, "accuracy": 70.0},
            common | {"method": "recycle", "n_shot": 5, "accuracy": 80.0},
        ]
    )
    out = capsys.readouterr().out
    assert "Accuracy on glyphs[greek/*,/x], %, ± 95 % confidence interval, 600 episodes" in " ".join(out.split())
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in out.splitlines()]
    assert ["method", "5-way 1-shot", "5-way 5-shot", "difference", "ms/episode"] in cells
    assert ["nn", "61.25 ± 1.50", "70.00 ± 1.50", "", "99.7"] in cells
    assert ["recycle", "", "80.00 ± 1.50", "", ""] in cells


def test_the_table_of_a_grid_leaves_a_shape_blank_that_a_cell_lacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    common = {"method": "nn", "dataset": "d", "n_way": 5, "seeds": {"0": 1.0}, "ci95": 1.0, "lowest": 40.0, "highest": 80.0}
    print_grid(
        [
            common | {"cell": "both", "n_shot": 1, "accuracy": 60.0},
            common | {"cell": "both", "n_shot": 5, "accuracy": 70.0},
            common | {"cell": "one", "n_shot": 5, "accuracy": 71.0},
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
    assert ["cell", "method", "5-way 1-shot", "5-way 5-shot"] in cells
    assert ["one", "nn", "", "71.00 ± 1.00 (40.0 to 80.0)"] in cells
