from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from lr_ray.errors import AdapterError, InversionError
from lr_ray.inversion.invert import InversionConfig, InversionStep, SyntheticImages, invert
from lr_ray.inversion.objective import cross_entropy
from lr_ray.inversion.priors import BatchNormPrior
from lr_ray.vit.augment import AugmentationConfig, random_views
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter
from lr_ray.vit.tokens import encode

MakeAdapter = Callable[..., Adapter]


def config(**changes: Any) -> InversionConfig:
    """Small, exact, and each step sees the very images."""
    small = {"images_per_class": 4, "batch_size": 12, "num_steps": 8, "prior": None, "precision": "fp32"}
    return InversionConfig(**{**small, "views": {"flip": False}, **changes})


def run(adapter: Adapter, backbone: Backbone, config: InversionConfig, *, seed: int = 0, **arguments: Any) -> SyntheticImages:
    arguments = {"prior": None, **arguments}
    return invert(adapter, backbone, config, generator=torch.Generator().manual_seed(seed), **arguments)


def adapter_logits(adapter: Adapter, backbone: Backbone, images: Tensor) -> Tensor:
    """By timm's own forward, on a model whose weights are changed by hand."""
    state = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    changed = {name: value.clone() for name, value in state.items()}
    for name, low_rank in adapter.modules.items():
        changed[f"{name}.weight"] += low_rank.scale * low_rank.b @ low_rank.a
    backbone.model.load_state_dict(changed)
    with torch.no_grad():
        features = backbone.model((images.float() / 255 - 0.5) / 0.5)
    backbone.model.load_state_dict(state)
    return features @ adapter.head_weight.T + adapter.head_bias


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_classes_are_grouped_and_complete(backbone: Backbone, make_adapter: MakeAdapter, batch_size: int):
    found = run(make_adapter(), backbone, config(batch_size=batch_size, num_steps=2))
    assert found.images.shape == (12, 3, 32, 32)
    assert found.images.dtype == torch.uint8
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.patch_order.shape == (12, 16)
    assert found.teacher_logits.shape == (12, 3)
    assert found.loss_ce.shape == found.loss_prior.shape == (12,)


def test_a_seed_gives_the_same_images_and_another_seed_does_not(backbone: Backbone, make_adapter: MakeAdapter):
    drawn = config(views={"roll": 0.25, "flip": True, "affine": 0.4, "noise": 0.1}, keep_ratios={0: 0.5})
    first, again = (run(make_adapter(), backbone, drawn, seed=7) for _ in range(2))
    for name in SyntheticImages.__dataclass_fields__:
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert not torch.equal(first.images, run(make_adapter(), backbone, drawn, seed=8).images)


def test_the_first_step_sees_noise_and_pixels_are_rounded(backbone: Backbone, make_adapter: MakeAdapter):
    found = run(make_adapter(num_classes=2), backbone, config(images_per_class=1, num_steps=1), seed=7)
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    expected = ((noise.clamp(-1, 1) * 0.5 + 0.5) * 255).round().to(torch.uint8)
    assert torch.equal(found.images, expected)


def test_images_of_a_batch_differ_from_those_of_the_next(backbone: Backbone, make_adapter: MakeAdapter):
    found = run(make_adapter(), backbone, config(batch_size=6))
    assert len(found.images.flatten(1).unique(dim=0)) == 12


def test_the_adapter_recognises_its_classes(backbone: Backbone, make_adapter: MakeAdapter):
    adapter = make_adapter()
    noise = (torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.5).clamp(0, 1) * 255
    labels = torch.tensor([0, 1, 2]).repeat_interleave(4)
    before = F.cross_entropy(adapter_logits(adapter, backbone, noise), labels)
    found = run(adapter, backbone, config(num_steps=60))
    logits = adapter_logits(adapter, backbone, found.images)
    assert F.cross_entropy(logits, found.labels) < 0.2 * before
    assert logits.argmax(dim=1).tolist() == found.labels.tolist()


def test_with_random_views_the_images_improve_in_the_mean_over_views(backbone: Backbone, make_adapter: MakeAdapter):
    adapter, views = make_adapter(), {"roll": 0.125, "flip": True}

    def mean_loss(found: SyntheticImages) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        drawn = [random_views(found.images / 255, AugmentationConfig(**views), generator=generator)[0] for _ in range(50)]
        losses = [F.cross_entropy(adapter_logits(adapter, backbone, view * 255), found.labels) for view in drawn]
        return torch.stack(losses).mean()

    first, last = (run(adapter, backbone, config(num_steps=steps, learning_rate=0.05, views=views)) for steps in (1, 150))
    assert mean_loss(last) < 0.75 * mean_loss(first)
    for found in (first, last):  # the loss is of the images as they are, not of the views that they were kept for
        logits = adapter_logits(adapter, backbone, found.images)
        torch.testing.assert_close(F.cross_entropy(logits, found.labels, reduction="none"), found.loss_ce)


def test_each_image_is_kept_from_its_own_best_step(
    backbone: Backbone, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Tensor] = []

    def record(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(F.cross_entropy(logits, labels, reduction="none"))
        return seen[-1]

    monkeypatch.setattr("lr_ray.inversion.invert.cross_entropy", record)
    adapter = make_adapter()
    found = run(adapter, backbone, config(num_steps=25, learning_rate=2.0))
    order = (torch.arange(12) % 3).argsort(stable=True)  # batches hold the classes in turn
    *steps_seen, _final = seen
    steps = torch.stack(steps_seen).detach()[:, order]
    assert len(steps) == 25
    assert len(steps.argmin(dim=0).unique()) > 1, "the best steps are the same for all: nothing is tested"
    torch.testing.assert_close(found.loss_ce, steps.min(dim=0).values, atol=0.02, rtol=0.1)  # but for the 8 bits
    assert found.loss_prior.tolist() == [0.0] * 12


def test_teacher_logits_are_the_merged_adapters_on_the_8_bit_images(backbone: Backbone, make_adapter: MakeAdapter):
    adapter = make_adapter()
    for keep_ratios in ({}, {0: 0.25}):  # all tokens count, however many were kept
        found = run(adapter, backbone, config(batch_size=5, keep_ratios=keep_ratios))
        torch.testing.assert_close(found.teacher_logits, adapter_logits(adapter, backbone, found.images))


def test_the_backbone_is_left_as_it_was(backbone: Backbone, make_adapter: MakeAdapter):
    before = {name: (value, value.clone()) for name, value in backbone.model.named_parameters()}
    run(make_adapter(), backbone, config(keep_ratios={0: 0.5}))
    for name, parameter in backbone.model.named_parameters():
        assert parameter is before[name][0], name
        assert torch.equal(parameter, before[name][1]), name
        assert parameter.grad is None, name


def test_tokens_are_dropped_from_prune_from_on(backbone: Backbone, make_adapter: MakeAdapter):
    counts: list[int] = []
    backbone.model.blocks[0].mlp.register_forward_hook(lambda _module, inputs, _output: counts.append(inputs[0].shape[1]))
    run(make_adapter(), backbone, config(num_steps=8, prune_from=0.25, keep_ratios={0: 0.5}))
    whole, half = 1 + 16, 1 + 8
    steps, describing = counts[:8], counts[8:]
    assert steps == [whole] * 2 + [half] * 6
    # the patch order under the schedule; the logits, and those of the mirrored images, on all tokens
    assert sorted(describing) == [half, whole, whole]


@pytest.mark.parametrize(("prune_from", "num_whole"), [(0.0, 0), (0.4, 4), (1.0, 8)])
def test_prune_from(backbone: Backbone, make_adapter: MakeAdapter, prune_from: float, num_whole: int):
    counts: list[int] = []
    backbone.model.blocks[0].mlp.register_forward_hook(lambda _module, inputs, _output: counts.append(inputs[0].shape[1]))
    run(make_adapter(), backbone, config(num_steps=8, prune_from=prune_from, keep_ratios={0: 0.5}))
    assert counts[:8] == [17] * num_whole + [9] * (8 - num_whole)


def test_patches_that_enter_follow_the_schedule(backbone: Backbone, make_adapter: MakeAdapter):
    entered: list[int] = []
    hook = backbone.model.blocks[0].norm1.register_forward_pre_hook(lambda _norm, args: entered.append(args[0].shape[1] - 1))
    run(make_adapter(), backbone, config(num_steps=8, sparse={0.25: 0.5, 0.75: 0.1}))
    hook.remove()
    dense, ranking = 16, 16
    assert entered[:10] == [dense, dense, ranking, 8, 8, 8, 8, ranking, 2, 2]


def test_a_schedule_that_keeps_all_changes_nothing(backbone: Backbone, make_adapter: MakeAdapter):
    views = {"roll": 0.25, "flip": True, "affine": 0.4, "noise": 0.1}
    dense, sparse = (run(make_adapter(), backbone, config(views=views, sparse=s)) for s in ({}, {0.0: 1.0}))
    assert torch.equal(dense.images, sparse.images)


def test_kept_patches_follow_the_mirrorings(backbone: Backbone, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch):
    left = torch.tensor([1.0, 0.9, 0.1, 0.2]).expand(12, 1, 4, 4)
    monkeypatch.setattr("lr_ray.inversion.invert.rank_patches", lambda *_: left)
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(model: nn.Module, images: Tensor, *, keep_indices: Tensor | None = None, **options: Any) -> Any:
        if keep_indices is not None:
            seen.append((images.detach(), keep_indices))
        return encode(model, images, keep_indices=keep_indices, **options)

    monkeypatch.setattr("lr_ray.inversion.invert.encode", spy)
    run(make_adapter(), backbone, config(num_steps=1, views={"flip": True}, sparse={0.0: 0.5}), seed=7)
    start = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(7)).clamp(-1, 1)
    ((views, kept),) = seen
    columns = kept % 4
    assert {frozenset(found.tolist()) for found in columns} == {frozenset({0, 1}), frozenset({2, 3})}
    patches = views.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3).transpose(1, 2)[torch.arange(12)[:, None], kept]
    expected = start[..., :16].flatten(1).sort().values
    torch.testing.assert_close(patches.flatten(1).sort().values, expected, rtol=0, atol=1e-5)


def test_the_prior_looks_as_often_as_told(backbone: Backbone, make_adapter: MakeAdapter):
    prior, looks = make_prior(), []
    prior._network.register_forward_pre_hook(lambda *_: looks.append(1))
    run(make_adapter(), backbone, config(batch_size=100, num_steps=8, prior_every=3), prior=prior)
    assert len(looks) == 3
    weighted, lazily = (
        run(make_adapter(), backbone, config(batch_size=100, num_steps=1, prior_weight=w, prior_every=e), prior=make_prior())
        for w, e in ((6.0, 1), (2.0, 3))
    )
    assert torch.equal(weighted.images, lazily.images)


def test_the_prior_looks_at_a_share_of_the_views_others_each_time(
    backbone: Backbone, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
):
    prior, looks, views = make_prior(), [], []
    prior._network.register_forward_pre_hook(lambda _, inputs: looks.append(inputs[0].detach()))

    def spy(model: nn.Module, images: Tensor, **options: Any) -> Any:
        views.append(images.detach())
        return encode(model, images, **options)

    monkeypatch.setattr("lr_ray.inversion.invert.encode", spy)
    run(make_adapter(), backbone, config(batch_size=100, num_steps=2, prior_share=0.4), prior=prior)
    chosen = []
    for look, seen in zip(looks, views, strict=False):
        same = (look[:, None] - (seen[None] * 0.5 + 0.5)).abs().amax(dim=(2, 3, 4)) < 1e-5
        assert same.sum(dim=1).tolist() == [1] * 5, "5 of 12, each of them a view"
        chosen.append(set(same.nonzero()[:, 1].tolist()))
    assert len(chosen[0]) == 5
    assert chosen[0] != chosen[1]


def test_random_patches_are_drawn_for_each_image_and_step(
    backbone: Backbone, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
):
    kept: list[Tensor] = []

    def spy(model: nn.Module, images: Tensor, *, keep_indices: Tensor | None = None, **options: Any) -> Any:
        kept.extend(() if keep_indices is None else (keep_indices,))
        return encode(model, images, keep_indices=keep_indices, **options)

    monkeypatch.setattr("lr_ray.inversion.invert.encode", spy)
    run(make_adapter(), backbone, config(num_steps=20, sparse={0.5: 0.25}, sparse_patches="random"))
    assert len(kept) == 10
    assert {tuple(found.shape) for found in kept} == {(12, 4)}
    assert all(len(set(row)) == 4 for found in kept for row in found.tolist())
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0][0], kept[0][1])
    assert set(torch.cat(kept).flatten().tolist()) == set(range(16))


def test_a_config_with_neither_is_stored_as_before_there_were_such():
    assert not {"sparse_patches", "prior_share"} & InversionConfig().model_dump(mode="json").keys()
    given = {"sparse_patches": "random", "prior_share": 0.5}
    assert given.items() <= InversionConfig(**given).model_dump(mode="json").items()


@pytest.mark.parametrize("keep_ratios", [{}, {1: 0.25}, {0: 0.5, 1: 0.5}])
def test_patch_order_is_a_permutation(backbone: Backbone, make_adapter: MakeAdapter, keep_ratios: dict[int, float]):
    found = run(make_adapter(), backbone, config(keep_ratios=keep_ratios))
    assert torch.equal(found.patch_order.sort(dim=1).values, torch.arange(16).expand(12, 16))


def test_patch_order_begins_with_the_patches_kept(backbone: Backbone, make_adapter: MakeAdapter):
    """Those of the highest attention in block 0, here by the whole matrix of every head."""
    found = run(replace(make_adapter(), modules={}), backbone, config(keep_ratios={0: 0.5}))
    kept: list[Tensor] = []
    handle = backbone.model.blocks[0].attn.qkv.register_forward_hook(lambda _m, _i, output: kept.append(output))
    encode(backbone.model, backbone.normalize(found.images))
    handle.remove()
    query, key, _ = kept[0].unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    attention = (query[:, :, :1] @ key.transpose(-2, -1) / 12**0.5).softmax(dim=-1).mean(dim=1)[:, 0, 1:]
    expected = attention.topk(8, dim=1).indices.sort(dim=1).values
    assert torch.equal(found.patch_order[:, :8].sort(dim=1).values, expected)


def test_on_step_is_called_once_per_step_and_batch(backbone: Backbone, make_adapter: MakeAdapter):
    steps: list[InversionStep] = []
    run(make_adapter(), backbone, config(batch_size=5, num_steps=3), on_step=steps.append)
    assert [step.done for step in steps] == list(range(1, 10))
    assert {step.total for step in steps} == {9}
    assert [len(step.loss_ce) for step in steps] == [5] * 6 + [2] * 3


class PreemptedError(Exception):
    pass


class Saving:
    """Saves at every `every`th step, through bytes; says that the process is lost after `last` steps."""

    def __init__(self, *, every: int) -> None:
        self.every, self.steps, self.last, self.content = every, 0, -1, b""

    def load(self) -> dict[str, Tensor] | None:
        return load_safetensors(self.content) if self.content else None

    def due(self) -> bool:
        self.steps += 1
        return self.steps % self.every == 0

    def save(self, state: dict[str, Tensor]) -> None:
        self.content = save_safetensors(state)

    def on_step(self, step: InversionStep) -> None:
        if step.done == self.last:
            raise PreemptedError


@pytest.mark.parametrize("how", [{"prior_every": 3}, {"sparse_patches": "random", "prior_share": 0.5}])
@pytest.mark.parametrize("canvas", ["pixels", "spectrum", "two-colour"])
@pytest.mark.parametrize("last", [1, 5, 8, 9, 11, 24])
def test_it_goes_on_from_a_checkpoint_bit_by_bit(
    backbone: Backbone, make_adapter: MakeAdapter, canvas: str, last: int, how: dict[str, Any]
):
    views = {"roll": 0.25, "flip": True, "noise": 0.1}
    drawn = config(canvas=canvas, batch_size=5, views=views, keep_ratios={0: 0.5}, sparse={0.5: 0.5}, **how)
    undisturbed = run(make_adapter(), backbone, drawn, prior=make_prior())
    saving = Saving(every=3)
    saving.last = last
    with pytest.raises(PreemptedError):
        run(make_adapter(), backbone, drawn, prior=make_prior(), checkpoint=saving, on_step=saving.on_step)
    counted: list[InversionStep] = []
    found = run(make_adapter(), backbone, drawn, seed=99, prior=make_prior(), checkpoint=saving, on_step=counted.append)
    saved = max((last - 1) // 3 * 3, 0)
    assert [step.done for step in counted] == list(range(saved + 1, 25))
    if saved:
        for name in SyntheticImages.__dataclass_fields__:
            assert torch.equal(getattr(found, name), getattr(undisturbed, name)), name


def test_some_classes_of_an_adapter(backbone: Backbone, make_adapter: MakeAdapter):
    found = run(make_adapter(), backbone, config(num_steps=60), classes=[2, 0])
    assert found.labels.tolist() == [0] * 4 + [2] * 4
    assert adapter_logits(make_adapter(), backbone, found.images).argmax(dim=1).tolist() == found.labels.tolist()


def make_prior() -> BatchNormPrior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network[1].running_mean.fill_(0.5)
    return BatchNormPrior(network, mean=torch.zeros(3), std=torch.ones(3))


def test_the_prior_pulls_by_its_weight(backbone: Backbone, make_adapter: MakeAdapter):
    prior = make_prior()
    free, held = (
        run(make_adapter(), backbone, config(num_steps=20, prior_weight=weight), prior=prior) for weight in (0.0, 50.0)
    )
    assert held.loss_prior.mean() < 0.9 * free.loss_prior.mean()
    with prior:
        pixels = held.images.float() / 255
        assert prior(pixels).item() == pytest.approx(held.loss_prior.mean().item(), rel=0.1)


def test_the_priors_hooks_are_gone_after_a_failure(backbone: Backbone, make_adapter: MakeAdapter):
    prior = make_prior()
    with pytest.raises(InversionError):
        run(make_adapter(), backbone, config(prior_weight=1e300), prior=prior)
    assert not any("forward" in vars(module) for module in prior._network.modules())


@pytest.mark.parametrize("term", ["tv_weight", "l2_weight"])
def test_the_image_terms_pull_by_their_weight(backbone: Backbone, make_adapter: MakeAdapter, term: str):
    def size(found: SyntheticImages) -> float:
        images = found.images.float() / 255 * 2 - 1
        return (images.diff(dim=3).abs() if term == "tv_weight" else images.square()).mean().item()

    free, held = (run(make_adapter(), backbone, config(num_steps=20, **{term: weight})) for weight in (0.0, 100.0))
    assert size(held) < 0.8 * size(free)


def test_an_adapter_without_a_head_is_refused(backbone: Backbone, make_adapter: MakeAdapter):
    headless = replace(make_adapter(), head_weight=None, head_bias=None)
    with pytest.raises(AdapterError, match="adapter-1 has no head"):
        run(headless, backbone, config())


def test_a_head_without_bias_serves(backbone: Backbone, make_adapter: MakeAdapter):
    adapter = make_adapter()
    unbiased, zero = replace(adapter, head_bias=None), replace(adapter, head_bias=torch.zeros(3))
    assert torch.equal(run(unbiased, backbone, config()).images, run(zero, backbone, config()).images)


def test_nan_weights_are_an_inversion_error_and_the_backbone_survives(backbone: Backbone, make_adapter: MakeAdapter):
    adapter = make_adapter()
    name = "blocks.0.attn.qkv"
    damaged = replace(adapter.modules[name], b=torch.full((72, 2), torch.nan))
    before = backbone.model.get_submodule(name).weight
    with pytest.raises(InversionError, match="adapter-1.*precision=fp32"):
        run(replace(adapter, modules=adapter.modules | {name: damaged}), backbone, config())
    assert backbone.model.get_submodule(name).weight is before
    assert torch.isfinite(before).all()


def test_one_hopeless_image_is_enough_for_an_error(backbone: Backbone, make_adapter: MakeAdapter):
    adapter = make_adapter()
    bias = torch.tensor([0.0, 0.0, -torch.inf])  # class 2 has an infinite loss, the others none
    with pytest.raises(InversionError):
        run(replace(adapter, head_bias=bias), backbone, config())


def test_images_that_break_on_the_way_are_an_error(
    backbone: Backbone, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
):
    """What was kept before is hardly more than noise. Adam keeps a NaN of the second step for ever."""
    calls: list[Tensor] = []

    def breaking(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(logits)
        loss = cross_entropy(logits, labels)
        return loss * torch.nan if len(calls) == 2 else loss

    monkeypatch.setattr("lr_ray.inversion.invert.cross_entropy", breaking)
    with pytest.raises(InversionError, match="the loss became NaN or infinite"):
        run(make_adapter(), backbone, config(num_steps=4))
    assert len(calls) == 4
