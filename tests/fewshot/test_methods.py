from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from lr_ray.errors import AdapterError, ConfigError
from lr_ray.fewshot.methods import FeatureMethod, MethodInputs, expand, find_method, ingredients_of, known_methods
from lr_ray.fewshot.methods.features import embedder
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter

MakeBackbone = Callable[[], Backbone]
MakeAdapter = Callable[..., Adapter]
METHODS = ["raw-pixels", "nn", "loras-avg", "loras-avg:3", "recycle", "joint", "oracle"]


@pytest.fixture
def adapters(make_adapter: MakeAdapter) -> list[Adapter]:
    return [make_adapter(1, rank=2), make_adapter(2, rank=3), make_adapter(3, rank=1)]


@pytest.fixture
def inputs(backbone: Backbone, make_adapter: MakeAdapter, adapters: list[Adapter]) -> MethodInputs:
    return MethodInputs(
        backbone=backbone,
        precision="fp32",
        adapters=lambda: iter(adapters),
        meta_lora=lambda: make_adapter(10, rank=4),
        joint=lambda: make_adapter(15, rank=4),
        oracle=lambda: make_adapter(20, rank=4),
    )


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 32, 32), generator=generator, dtype=torch.uint8)


def product(adapter: Adapter, name: str) -> Tensor:
    return adapter.modules[name].scale * adapter.modules[name].b @ adapter.modules[name].a


def mean_product(adapters: list[Adapter], name: str) -> Tensor:
    return torch.stack([product(adapter, name) for adapter in adapters]).mean(dim=0)


def features_of(backbone: Backbone, images: Tensor, update: Callable[[str], Tensor]) -> Tensor:
    """By timm's own forward, on weights changed by hand."""
    for index in range(2):
        name = f"blocks.{index}.attn.qkv"
        backbone.model.get_submodule(name).weight.add_(update(name))
    return backbone.model((images.float() / 255 - 0.5) / 0.5)


def embed(inputs: MethodInputs, name: str, images: Tensor) -> Tensor:
    with embedder(inputs, features_name(name)) as to_features:
        return to_features(images)


def features_name(name: str) -> str:
    chosen = find_method(name)
    assert isinstance(chosen.method, FeatureMethod)
    return chosen.method.features(chosen.settings)


def test_nn_is_the_bare_backbone(inputs: MethodInputs, images: Tensor, make_backbone: MakeBackbone):
    expected = features_of(make_backbone(), images, lambda _name: torch.zeros(()))
    torch.testing.assert_close(embed(inputs, "nn", images), expected)


@pytest.mark.parametrize(("name", "scale"), [("loras-avg", 1), ("loras-avg:3", 3), ("loras-avg:0.5", 0.5), ("loras-avg:0", 0)])
def test_loras_avg_is_the_mean_of_the_products(
    inputs: MethodInputs,
    images: Tensor,
    make_backbone: MakeBackbone,
    adapters: list[Adapter],
    name: str,
    scale: float,
):
    expected = features_of(make_backbone(), images, lambda module: scale * mean_product(adapters, module))
    torch.testing.assert_close(embed(inputs, name, images), expected, atol=1e-5, rtol=1e-4)


def test_loras_avg_changes_no_adapter(inputs: MethodInputs, images: Tensor, adapters: list[Adapter]):
    before = [{name: value.clone() for name, value in adapter.tensors().items()} for adapter in adapters]
    first = embed(inputs, "loras-avg:3", images)
    for adapter, tensors in zip(adapters, before, strict=True):
        assert all(torch.equal(value, tensors[name]) for name, value in adapter.tensors().items())
    assert torch.equal(embed(inputs, "loras-avg:3", images), first)


@pytest.mark.parametrize(("name", "seed"), [("recycle", 10), ("joint", 15), ("oracle", 20)])
def test_a_meta_lora_is_merged(
    inputs: MethodInputs,
    images: Tensor,
    make_backbone: MakeBackbone,
    make_adapter: MakeAdapter,
    name: str,
    seed: int,
):
    expected = features_of(make_backbone(), images, lambda module: product(make_adapter(seed, rank=4), module))
    torch.testing.assert_close(embed(inputs, name, images), expected, atol=1e-5, rtol=1e-4)


def test_raw_pixels_are_the_pixels(inputs: MethodInputs, images: Tensor):
    found = embed(inputs, "raw-pixels", images)
    assert found.shape == (5, 3 * 32 * 32)
    torch.testing.assert_close(found.view(5, 3, 32, 32) * 255, images.float())


def test_the_methods_differ(inputs: MethodInputs, images: Tensor):
    found = [embed(inputs, name, images) for name in METHODS if name != "raw-pixels"]
    for index, one in enumerate(found):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in found[index + 1 :])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_backbone_is_left_as_it_was(inputs: MethodInputs, images: Tensor, name: str, fails: bool):
    before = {key: (value, value.clone()) for key, value in inputs.backbone.model.named_parameters()}
    try:
        with embedder(inputs, features_name(name)) as to_features:
            to_features(images)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    after = dict(inputs.backbone.model.named_parameters())
    assert after.keys() == before.keys()
    for key, parameter in after.items():
        assert parameter is before[key][0], key
        assert torch.equal(parameter, before[key][1]), key


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("raw-pixels", None),
        ("nn", None),
        ("loras-avg", "adapters"),
        ("recycle", "meta_lora"),
        ("joint", "joint"),
        ("oracle", "oracle"),
        ("bpa:features=oracle", "oracle"),
        ("linear-probe:loras-avg:2", "adapters"),
        ("loras-avg-linear", "adapters"),
    ],
)
def test_a_method_reads_only_what_it_needs(
    backbone: Backbone, make_adapter: MakeAdapter, images: Tensor, name: str, needs: str | None
):
    def absent() -> NoReturn:
        raise AssertionError(f"{name} read what it does not need")

    def adapters() -> Iterator[Adapter]:
        yield make_adapter(1)

    sources = {"adapters": absent, "meta_lora": absent, "joint": absent, "oracle": absent}
    if needs:
        sources[needs] = adapters if needs == "adapters" else lambda: make_adapter(1)
    assert len(embed(MethodInputs(backbone=backbone, precision="fp32", **sources), name, images)) == 5
    assert find_method(name).needs == ((needs,) if needs else ())


def test_what_methods_need_together():
    assert ingredients_of(["nn", "caml", "recycle", "bpa:joint"]) == {"tune", "meta_lora", "joint"}


def test_all_is_every_method_once_with_its_defaults():
    found = expand(["loras-avg:2", "all", "nn"])
    assert found[0] == "loras-avg:2"
    assert found[-1] == "nn"
    assert sorted(found[1:]) == sorted(known_methods())
    assert expand(["nn", "recycle", "nn"]) == ("nn", "recycle")


def test_every_method_tells_its_source_and_has_settings_with_defaults():
    for name, method in known_methods().items():
        assert method.name == name
        assert len(method.source) > 10
        method.settings()


@pytest.mark.parametrize("name", ["no-such-method", "", "NN", "loras_avg", "loras-avg3"])
def test_an_unknown_method_is_refused_and_the_known_are_named(name: str):
    with pytest.raises(ConfigError, match=r"is not a method; .*there are .*loras-avg.*nn.*oracle.*recycle") as caught:
        find_method(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loras-avg:x", r"scale: .*valid number.*; settings of loras-avg: scale \(default 1.0\)"),
        ("loras-avg:1,5", "scale: .*valid number"),
        ("loras-avg:inf", "scale: .*finite number"),
        ("nn:3", "3: no such setting; settings of nn: none"),
        (
            "bpa:shots=1",
            r"shots: no such setting; settings of bpa: features \(default backbone\), regularisation \(default 0.1\)",
        ),
        ("bpa:regularisation=0", "regularisation: .*greater than 0"),
        ("bpa:features=nn", "features: .*no such features; there are raw-pixels, backbone"),
        ("bpa:features=loras-avg:x", "features: .*the scale of loras-avg:SCALE is a number"),
        ("coop", "coop does not apply: it learns the words of a text encoder"),
        ("CoOp", "CoOp does not apply: it learns the words of a text encoder"),
    ],
)
def test_settings_that_are_not_allowed(name: str, message: str):
    with pytest.raises(ConfigError, match=f"evaluation.methods: .*{message}"):
        find_method(name)


def test_settings_follow_the_name():
    settings = find_method("bpa:features=loras-avg:2,regularisation=0.2").settings
    assert (settings.features, settings.regularisation, settings.num_iterations) == ("loras-avg:2", 0.2, 10)
    assert find_method("loras-avg:3").settings.scale == 3.0


def test_an_installed_package_may_bring_a_method(monkeypatch: pytest.MonkeyPatch):
    mine = FeatureMethod(
        name="mine", source="tests", features=lambda _: "backbone", head=lambda *_: lambda _support, queries: queries
    )

    class Entry:
        def load(self) -> FeatureMethod:
            return mine

    monkeypatch.setattr("lr_ray.fewshot.methods.entry_points", lambda *, group: [Entry()] if group == "lr_ray.methods" else [])
    known_methods.cache_clear()
    try:
        assert find_method("mine").method is mine
    finally:
        monkeypatch.undo()
        known_methods.cache_clear()


def test_no_adapters_have_no_average(backbone: Backbone, make_adapter: MakeAdapter, images: Tensor):
    inputs = MethodInputs(
        backbone=backbone,
        precision="fp32",
        adapters=list,
        meta_lora=lambda: make_adapter(1),
        joint=lambda: make_adapter(1),
        oracle=lambda: make_adapter(1),
    )
    with pytest.raises(AdapterError, match="no adapters to average"):
        embed(inputs, "loras-avg", images)
