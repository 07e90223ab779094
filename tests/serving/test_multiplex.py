"""Several meta-LoRAs on one backbone: each answers as if it were alone, and names are found for them."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import lr_ray
from lr_ray.errors import ConfigError, RequestError
from lr_ray.model import Model
from lr_ray.serving.models import Catalogue, ServedModel, name_meta_loras
from lr_ray.serving.multiplex import load_multiplex
from lr_ray.storage.adapters import read_adapter, write_adapter
from lr_ray.storage.manifest import read_manifest
from lr_ray.vit.backbone import BackboneConfig, load_backbone
from lr_ray.vit.lora import Adapter, LowRank
from lr_ray.vit.tokens import encode_pixels

IMAGES = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def two(meta_lora: str, tmp_path: Path) -> dict[str, str]:
    """Another beside `meta_lora`, with a bias changed too."""
    adapter, other = read_adapter(meta_lora), str(tmp_path / "other")
    modules = {name: LowRank(a=m.a.flip(0) * 2, b=m.b, scale=m.scale) for name, m in adapter.modules.items()}
    shifts = {"blocks.1.mlp.fc1.bias": torch.ones(768)}
    facts = {"kind": "meta_lora", "config": (read_manifest(meta_lora) or {})["config"]}
    write_adapter(other, Adapter(spec=adapter.spec, modules=modules, shifts=shifts), inputs={}, facts=facts)
    return {"one": meta_lora, "two": other}


def test_each_answers_as_if_it_were_alone_in_any_order(two: dict[str, str]):
    multiplex = load_multiplex(two)
    expected = {name: lr_ray.load(path).embed(IMAGES) for name, path in two.items()}
    backbone = load_backbone(BackboneConfig(name="vit_tiny_patch16_224", image_px=32, pretrained=False))
    expected["backbone"] = encode_pixels(backbone, IMAGES, precision=multiplex.models["one"].precision)
    for name in ("backbone", "one", "two", "two", "one", "backbone", "two", "backbone"):
        assert torch.equal(multiplex.embed(name, IMAGES), expected[name]), name
    apart = [(expected[a] - expected[b]).norm() / expected[a].norm() for a, b in (("one", "two"), ("one", "backbone"))]
    assert min(apart) > 0.01


def test_a_pass_for_each_model_of_the_groups(two: dict[str, str]):
    multiplex = load_multiplex(two)
    names = ["two", "backbone", "one", "two"]
    sizes = [2, 1, 4, 2]
    found = multiplex.embed_groups([part.numpy() for part in IMAGES.split(sizes)], names)
    for name, part, features in zip(names, IMAGES.split(sizes), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(features), multiplex.embed(name, part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("images", "expected"), [(9, [(5, 1), (4, 1)]), (4, [(2, 1), (2, 1)]), (3, [(3, 2)]), (1, [(1, 2)])])
def test_threads_share_out_images_and_a_few_of_them_operations(
    images: int, expected: list[tuple[int, int]], two: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    multiplex, before, seen = load_multiplex(two, threads=2), torch.get_num_threads(), []
    embed = Model.embed

    def watched(model: Model, pixels: torch.Tensor) -> torch.Tensor:
        seen.append((len(pixels), torch.get_num_threads()))
        return embed(model, pixels)

    monkeypatch.setattr(Model, "embed", watched)
    try:
        found = multiplex.embed("two", IMAGES[:images])
        with ThreadPoolExecutor(1) as later:
            later.submit(multiplex.embed, "two", IMAGES[:1]).result()
    finally:
        torch.set_num_threads(before)
    *spread, last = seen
    assert sorted(spread, reverse=True) == expected
    assert last == (1, 2)
    torch.testing.assert_close(found, load_multiplex(two).embed("two", IMAGES[:images]), rtol=1e-2, atol=1e-2)


def test_attention_is_of_the_model_that_is_asked(two: dict[str, str]):
    multiplex = load_multiplex(two)
    maps = {name: multiplex.attend(name, IMAGES) for name in ("one", "backbone")}
    assert torch.equal(maps["one"], lr_ray.load(two["one"]).attend(IMAGES))
    assert maps["one"].shape == (9, 2, 2)
    torch.testing.assert_close(maps["backbone"].sum(dim=(1, 2)), torch.ones(9))
    assert not torch.allclose(maps["one"], maps["backbone"], atol=1e-4)


def test_what_a_meta_lora_costs_is_its_factors(two: dict[str, str]):
    multiplex = load_multiplex(two)
    models = {id(model.backbone.model) for model in multiplex.models.values()}
    assert len(models) == 1
    parameters = multiplex.models["one"].backbone.model.parameters
    before = [p.data_ptr() for p in parameters()]
    multiplex.embed("two", IMAGES)
    assert sum(a != b.data_ptr() for a, b in zip(before, parameters(), strict=True)) == 13  # 12 qkv, one bias
    multiplex.embed("backbone", IMAGES)
    assert [p.data_ptr() for p in parameters()] == before


def test_a_failed_pass_leaves_the_next_in_order(two: dict[str, str]):
    multiplex = load_multiplex(two)
    expected = multiplex.embed("one", IMAGES)
    with pytest.raises(Exception, match="give a sequence of PIL images"):
        multiplex.embed("two", IMAGES[:, :2])
    assert torch.equal(multiplex.embed("one", IMAGES), expected)


def test_digests_tell_models_apart(two: dict[str, str]):
    catalogue = load_multiplex(two).catalogue
    assert [model.name for model in catalogue.models] == ["one", "two", "backbone"]
    assert len(set(catalogue.digests)) == 3
    assert catalogue.num_features == 192
    assert load_multiplex({"renamed": two["two"]}).catalogue.digests == catalogue.digests[1:]


def test_a_digest_covers_precision_and_alpha(two: dict[str, str]):
    path = Path(two["two"]) / "adapter_config.json"
    before, wide = (load_multiplex(two, precision=precision).catalogue.digests for precision in ("bf16", "fp32"))
    assert not set(before) & set(wide)
    facts = json.loads(path.read_text())
    patterns = {name: 2 * alpha for name, alpha in facts["alpha_pattern"].items()}
    path.write_text(json.dumps(facts | {"lora_alpha": 2 * facts["lora_alpha"], "alpha_pattern": patterns}))
    after = load_multiplex(two, precision="bf16").catalogue.digests
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_another_image_size_is_another_service(two: dict[str, str]):
    path = Path(two["two"]) / "lr_ray.json"
    path.write_text(path.read_text().replace('"image_px": 32', '"image_px": 48'))
    with pytest.raises(ConfigError, match=r"meta-LoRA two .* at 48 px, but one of .* at 32 px; one service has one backbone"):
        load_multiplex(two)


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["runs/demo/meta_lora"], ["demo"]),
        (["runs/demo/meta_lora/"], ["demo"]),
        (["meta_lora"], ["meta_lora"]),
        (["s3://bucket/a b/é=1"], ["1"]),
        (["./a=b"], ["a-b"]),
        (["a=b"], ["a"]),
        (["x/backbone"], ["backbone-2"]),
        (["x/demo", "y/demo", "demo-2=z", "demo/meta_lora"], ["demo", "demo-3", "demo-2", "demo-4"]),
        (["/"], ["model"]),
    ],
)
def test_names_of_paths(arguments: list[str], names: list[str]):
    assert list(name_meta_loras(arguments)) == names


def test_a_given_name_is_before_the_path():
    assert name_meta_loras(["a=b=c", "./d"]) == {"a": "b=c", "d": "./d"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no meta-LoRA; give"),
        (["é=x"], "model name 'é': give 1 to 63"),
        (["=x"], "model name '': give 1 to 63"),
        (["a=x", "a=y"], "model name 'a' is given twice"),
        (["backbone=x"], "model name 'backbone' means the plain backbone"),
    ],
)
def test_names_that_cannot_be(arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        name_meta_loras(arguments)


def test_an_unknown_name_lists_those_that_are_there():
    catalogue = Catalogue(models=(ServedModel(name="a", digest="1"), ServedModel(name="backbone", digest="2")), num_features=3)
    with pytest.raises(RequestError, match="model 'x' is not served here; give one of a, backbone") as caught:
        catalogue.find("x")
    assert caught.value.status == 422
    assert catalogue.find(None).name == "a"
    assert catalogue.find("backbone").digest == "2"
