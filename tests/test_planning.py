import json
from pathlib import Path

import pytest
import timm
import torch
from lr_ray.cli.main import app
from torch import Tensor
from typer.testing import CliRunner

from lr_ray.config import ExperimentConfig
from lr_ray.errors import BackboneError
from lr_ray.planning import GPUS, Gpu, job_cost, plan_on
from lr_ray.vit.tokens import encode

TINY = {"name": "vit_tiny_patch16_224", "image_px": 64, "pretrained": False}


def experiment(**inversion: object) -> ExperimentConfig:
    fields = {"images_per_class": 2, "batch_size": 6, "num_steps": 8, "prior": None, **inversion}
    return ExperimentConfig.model_validate({"name": "plan", "backbone": TINY, "inversion": fields})


def really_kept(batch: int) -> int:
    """Bytes that a real forward pass keeps, on real tensors."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0).eval().requires_grad_(False)
    weights = {value.data_ptr() for value in model.state_dict().values()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    images = torch.randn(batch, 3, 64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        encode(model, images)
    return sum(nbytes for _, nbytes in kept.values())


def test_the_activations_are_those_that_a_real_pass_keeps():
    cost = job_cost(experiment(), num_classes=3)
    assert cost.inversion.kept_mib * 2**20 == pytest.approx(really_kept(6), rel=0.02)


def test_flops_are_those_of_the_matrix_products():
    """12 blocks of width 192 on 17 tokens, the last MLP on [CLS] alone; backward to the images costs the same again."""
    tokens, width = 17, 192
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    saved = 2 * (tokens - 1) * 8 * width**2
    patches = 2 * 16 * 3 * 16**2 * width
    forward = 12 * block - saved + patches
    cost = job_cost(experiment(), num_classes=3)
    assert cost.inversion.tflop == pytest.approx(2 * 6 * forward / 1e12, rel=0.01)


def test_a_schedule_takes_its_share():
    dense, sparse, half = (
        job_cost(experiment(sparse=s), num_classes=3).inversion.tflop for s in ({}, {0.0: 0.25}, {0.5: 0.25})
    )
    assert sparse < 0.45 * dense
    assert half == pytest.approx((dense + sparse) / 2)


def test_the_prior_counts_as_often_as_it_looks_and_for_the_images_that_it_does():
    alone, always, seldom, few = (
        job_cost(experiment(**changes), num_classes=3).inversion.tflop
        for changes in ({}, *({"prior": "efficientnet-lite0", **how} for how in ({}, {"prior_every": 4}, {"prior_share": 0.5})))
    )
    assert always > alone
    assert seldom - alone == pytest.approx((always - alone) / 4)
    assert few - alone == pytest.approx((always - alone) / 2)


def test_steps_of_an_adapter():
    assert job_cost(experiment(), num_classes=3).inversion_steps == 8
    assert job_cost(experiment(), num_classes=4).inversion_steps == 16


def test_the_images_for_the_metric_count_too():
    config = experiment()
    fewer = config.inversion.model_copy(update={"num_steps": 2, "sparse": {0.0: 0.25}})
    alone, both = (job_cost(config.model_copy(update={"metric_inversion": m}), num_classes=3) for m in (None, fewer))
    other = job_cost(config.model_copy(update={"inversion": fewer}), num_classes=3)
    assert both.inversion_steps == alone.inversion_steps + other.inversion_steps == 10
    expected = (8 * alone.inversion.tflop + 2 * other.inversion.tflop) / 10
    assert both.inversion.tflop == pytest.approx(expected)
    assert both.inversion.kept_mib == alone.inversion.kept_mib > other.inversion.kept_mib
    assert both.training == alone.training


def test_actors_fill_a_gpu_as_far_as_they_fit():
    cost = job_cost(experiment(), num_classes=3)
    small = Gpu(name="small", memory_gib=0.1, tflops=1, dollars_per_h=1)
    assert plan_on(small, cost, num_adapters=5).actors == 0
    assert plan_on(small, cost, num_adapters=5).inversion_h is None
    plans = [plan_on(gpu, cost, num_adapters=100) for gpu in GPUS]
    assert all(found.actors * found.actor_mib <= gpu.memory_gib * 1024 for found, gpu in zip(plans, GPUS, strict=True))
    assert plans[-1].inversion_h < plans[0].inversion_h
    twice = plan_on(GPUS[0], cost, num_adapters=200)
    assert twice.inversion_h == pytest.approx(2 * plans[0].inversion_h)


def test_classes_in_pieces():
    whole = job_cost(experiment(batch_size=50), num_classes=30)
    assert whole.inversion_steps == 3 * 8
    assert job_cost(experiment(batch_size=50, classes_per_item=30), num_classes=30).inversion_steps == 2 * 8


@pytest.mark.parametrize("sizes", [{"batch_size": 3}, {"batch_size": 5}, {"batch_size": 6, "classes_per_item": 2}])
def test_a_batch_that_is_not_full_counts_as_what_it_is(sizes: dict[str, int]):
    """3 classes of 2 images, however they are cut."""
    whole, cut = (job_cost(experiment(**changes), num_classes=3) for changes in ({}, sizes))
    assert cut.inversion_steps == 2 * whole.inversion_steps
    total, of_cut = (cost.inversion_steps * cost.inversion.tflop for cost in (whole, cut))
    assert of_cut == pytest.approx(total, rel=0.01)


def test_recomputed_activations():
    plain = experiment()
    again = plain.model_copy(update={"training": plain.training.model_copy(update={"recompute": True})})
    usual, less = job_cost(plain, num_classes=3).training, job_cost(again, num_classes=3).training
    assert less.kept_mib < 0.5 * usual.kept_mib
    assert 1.2 * usual.tflop < less.tflop < 1.5 * usual.tflop


def test_a_backbone_that_the_method_does_not_work_on():
    with pytest.raises(BackboneError, match="ResNet"):
        job_cost(ExperimentConfig.model_validate({"name": "plan", "backbone": {"name": "resnet18"}}), num_classes=5)
    with pytest.raises(BackboneError, match="not a multiple"):
        job_cost(ExperimentConfig.model_validate({"name": "plan", "backbone": TINY | {"image_px": 65}}), num_classes=5)


def test_unknown_networks():
    with pytest.raises(BackboneError, match="vit_none"):
        job_cost(ExperimentConfig.model_validate({"name": "plan", "backbone": {"name": "vit_none"}}), num_classes=5)
    with pytest.raises(BackboneError, match="resnet_none"):
        job_cost(experiment(prior="resnet_none"), num_classes=5)


def test_the_command(tmp_path: Path):
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps({"name": "plan", "backbone": TINY}))
    found = CliRunner().invoke(app, ["plan", "-c", str(path), "--num-adapters", "1000", "--json"])
    assert found.exit_code == 0, found.output
    assert [gpu["gpu"] for gpu in json.loads(found.stdout)["gpus"]] == [gpu.name for gpu in GPUS]
    shown = CliRunner().invoke(app, ["plan", "-c", str(path), "--num-adapters", "1000"])
    assert "1,000 adapters of 5 classes" in shown.stdout
    assert "A100" in shown.stdout
