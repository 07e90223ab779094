"""What the tests of the runtime share: one whole job on local disk."""

import json
from pathlib import Path
from typing import Any

import pytest
from lr_ray.cli.main import app
from typer.testing import CliRunner

from tests.jobs import tiny


@pytest.fixture(scope="session")
def local_run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The YAML file of a tiny experiment that has been run through the command line into `run` beside it, and its rows."""
    folder = tmp_path_factory.mktemp("local")
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(tiny(folder).resolved()))
    done = CliRunner().invoke(app, ["run", str(path), "--json"], catch_exceptions=False)
    return path, json.loads(done.stdout)
