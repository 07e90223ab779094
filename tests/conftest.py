"""What several test folders share: a tiny backbone and adapters for it, a tiny experiment, and one Ray for the session."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from filelock import FileLock
from fsspec import get_filesystem_class
from lr_ray.cli.main import app
from timm.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner

from lr_ray.config import ExperimentConfig, RayConfig, load_config
from lr_ray.fewshot.metric import MetricConfig, fit_metric
from lr_ray.storage.adapters import write_adapter
from lr_ray.storage.metric import write_metric
from lr_ray.vit.backbone import Backbone, load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, LowRank
from tests.jobs import tiny
from tests.s3 import FaultyProxy, environment, s3_server

torch.set_num_threads(1)
# Ray's workers are at 15 by default: while another process of pytest computes, they would hardly run
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def s3() -> Iterator[FaultyProxy]:
    """An S3 server for the session, in the environment of this process and of those that it starts from then on."""
    with s3_server() as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(proxy).items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture
def bucket(s3: FaultyProxy) -> Iterator[str]:
    """URI of a new bucket, `s3` as good as new."""
    get_filesystem_class("s3").clear_instance_cache()
    s3.set_faults(())
    name = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    s3.set_faults(())
    yield f"s3://{name}"
    s3.set_faults(())


@pytest.fixture(scope="session")
def ray_cluster(s3: FaultyProxy) -> Iterator[None]:
    """One local Ray of two processors, bound to loopback, whose workers know `s3`."""
    from lr_ray.runtime.session import ray_session

    with ray_session(RayConfig(num_cpus=2, dashboard=False)):
        yield


@pytest.fixture
def tiny_experiment(tmp_path: Path) -> ExperimentConfig:
    """A whole job of seconds: an untrained ViT-Tiny at 32 px, three adapters of handwritten digits."""
    return tiny(tmp_path)


@pytest.fixture(scope="session")
def local_run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The YAML file of a tiny experiment that has been run through the command line into `run` beside it, and its rows.

    One of pytest's parallel processes runs it, for all.
    """
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared) / "local"
    path = folder / "tiny.yaml"
    with FileLock(f"{folder}.lock"):
        if not path.exists():
            folder.mkdir()
            path.write_text(json.dumps(tiny(folder).resolved()))
            done = CliRunner().invoke(app, ["run", str(path), "--json"], catch_exceptions=False)
            (folder / "stdout.json").write_text(done.stdout)
    return path, json.loads((folder / "stdout.json").read_text())


@pytest.fixture(scope="session")
def made_before(local_run: tuple[Path, list[dict[str, Any]]]) -> ExperimentConfig:
    """That experiment, whose adapters and synthetic images are there; not to be changed."""
    return load_config(local_run[0])


@pytest.fixture
def library(tiny_experiment: ExperimentConfig, made_before: ExperimentConfig) -> ExperimentConfig:
    """A `tiny_experiment` whose adapters are there."""
    shutil.copytree(made_before.adapters_root, tiny_experiment.adapters_root)
    return tiny_experiment


@pytest.fixture
def inverted(library: ExperimentConfig, made_before: ExperimentConfig) -> ExperimentConfig:
    """A `tiny_experiment` whose adapters and synthetic images are there."""
    shutil.copytree(made_before.synthetic_root, library.synthetic_root)
    return library


@pytest.fixture
def meta_lora(tiny_experiment: ExperimentConfig) -> str:
    """A folder as `lr-ray train` leaves it: a meta-LoRA of drawn weights, large enough to change the features, and a metric."""
    backbone = load_backbone(tiny_experiment.backbone)
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    spec = AdapterSpec(
        adapter_id="meta_lora", digest="", backbone=backbone.name, backbone_digest=backbone.digest, class_names=()
    )
    width = backbone.num_features
    modules = {
        f"blocks.{i}.attn.qkv": LowRank(a=draw(4, width), b=draw(3 * width, 4), scale=1.0)
        for i in range(len(backbone.model.blocks))
    }
    metric = fit_metric(draw(40, width) + draw(width), torch.arange(8).repeat(5), MetricConfig())
    digest = write_metric(tiny_experiment.meta_lora_root, metric)
    facts = {"kind": "meta_lora", "config": tiny_experiment.resolved(), "metric": digest}
    write_adapter(tiny_experiment.meta_lora_root, Adapter(spec=spec, modules=modules), inputs={}, facts=facts)
    return tiny_experiment.meta_lora_root


@pytest.fixture
def make_backbone() -> Callable[[], Backbone]:
    """Every call gives a new model with the same weights, large enough for features to depend on the pixels."""

    def make() -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
        model.eval().requires_grad_(False)
        half = torch.full((3,), 0.5)
        return Backbone(name="tiny", model=model, image_px=32, mean=half, std=half, digest="tiny", source="random")

    return make


@pytest.fixture
def backbone(make_backbone: Callable[[], Backbone]) -> Backbone:
    return make_backbone()


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    def make(seed: int = 1, *, rank: int = 2, num_classes: int = 4) -> Adapter:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return 0.3 * torch.randn(*shape, generator=generator)

        names = [f"blocks.{block}.attn.qkv" for block in range(2)]
        return Adapter(
            spec=AdapterSpec(
                adapter_id=f"adapter-{seed}",
                digest=str(seed),
                backbone="tiny",
                backbone_digest="tiny",
                class_names=tuple(f"class {c}" for c in range(num_classes)),
            ),
            modules={name: LowRank(a=draw(rank, 24), b=draw(72, rank), scale=1.5) for name in names},
            head_weight=draw(num_classes, 24),
            head_bias=draw(num_classes),
        )

    return make
