import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lr_ray.data.images import DataConfig
from lr_ray.data.load import load_data
from lr_ray.errors import StorageError
from lr_ray.fewshot.episodes import ClassRef
from lr_ray.inversion.invert import SyntheticImages
from lr_ray.storage.synthetic import (
    adapter_id_of,
    count_images,
    list_synthetic,
    read_classes,
    read_first_classes,
    read_index,
    read_pool,
    synthetic_name,
    write_synthetic,
)
from lr_ray.vit.lora import AdapterSpec

NUM_PATCHES = 4
IDENTITY = {"digest": "of the backbone", "image_px": 8}


def spec_of(adapter_id: str, class_names: tuple[str, ...]) -> AdapterSpec:
    return AdapterSpec(
        adapter_id=adapter_id, digest=adapter_id, backbone="tiny", backbone_digest="tiny", class_names=class_names
    )


def draw(num_classes: int, per_class: int, *, side_px: int = 8, seed: int = 0) -> SyntheticImages:
    """Noise, class by class; teacher logit of image i for class c: i + c / 8, which half precision holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    count = num_classes * per_class
    return SyntheticImages(
        images=torch.randint(0, 256, (count, 3, side_px, side_px), generator=generator, dtype=torch.uint8),
        labels=torch.arange(num_classes).repeat_interleave(per_class),
        patch_order=torch.stack([torch.randperm(NUM_PATCHES, generator=generator) for _ in range(count)]),
        teacher_logits=torch.arange(count)[:, None] + torch.arange(num_classes) / 8,
        flipped_logits=-torch.arange(count)[:, None] - torch.arange(num_classes) / 8,
        loss_ce=torch.rand(count, generator=generator),
        loss_prior=torch.rand(count, generator=generator),
    )


CATS, CAT_SPEC = draw(3, 2, seed=1), spec_of("cats", ("lion", "tiger", "lynx"))
DOGS, DOG_SPEC = draw(2, 4, seed=2), spec_of("dogs", ("wolf", "lynx"))


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Two adapters, of three classes and of two."""
    write_synthetic(str(tmp_path / "cats-111111111111.parquet"), CATS, CAT_SPEC, seed=5, identity=IDENTITY)
    write_synthetic(str(tmp_path / "dogs-222222222222.parquet"), DOGS, DOG_SPEC, seed=6, identity=IDENTITY)
    return str(tmp_path)


def test_a_name_tells_its_adapter():
    name = synthetic_name("task-0003-with-dashes", "0123456789abcdef")
    assert name == "task-0003-with-dashes-0123456789ab.parquet"
    assert adapter_id_of(name) == adapter_id_of(f"folder/{name}") == "task-0003-with-dashes"


def test_the_schema(root: str):
    schema = pq.read_schema(f"{root}/cats-111111111111.parquet")
    assert {field.name: str(field.type).replace("element", "item") for field in schema} == {
        "adapter_id": "string",
        "class_index": "int32",
        "class_name": "string",
        "image": "struct<bytes: binary, path: string>",
        "patch_order": "list<item: uint16>",
        "teacher_logits": "list<item: halffloat>",
        "flipped_logits": "list<item: halffloat>",
        "seed": "int64",
        "loss_ce": "float",
        "loss_prior": "float",
    }
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}


def test_the_rows(root: str):
    rows = pq.read_table(f"{root}/cats-111111111111.parquet").to_pylist()
    assert [row["adapter_id"] for row in rows] == ["cats"] * 6
    assert [row["class_index"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert [row["class_name"] for row in rows] == ["lion", "lion", "tiger", "tiger", "lynx", "lynx"]
    assert [row["seed"] for row in rows] == [5] * 6
    assert [row["patch_order"] for row in rows] == CATS.patch_order.tolist()
    assert [row["teacher_logits"] for row in rows] == CATS.teacher_logits.tolist()
    assert [row["flipped_logits"] for row in rows] == CATS.flipped_logits.tolist()
    assert [row["loss_ce"] for row in rows] == CATS.loss_ce.tolist()
    assert [row["loss_prior"] for row in rows] == CATS.loss_prior.tolist()
    assert len({row["image"]["path"] for row in rows}) == 6


def test_images_are_lossless(root: str):
    rows = pq.read_table(f"{root}/cats-111111111111.parquet").to_pylist()
    for row, image in zip(rows, CATS.images, strict=True):
        decoded = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert (decoded.format, decoded.mode) == ("PNG", "RGB")
        assert np.array_equal(np.array(decoded), image.permute(1, 2, 0).numpy())


def test_a_row_group_is_a_class(root: str):
    file = pq.ParquetFile(f"{root}/dogs-222222222222.parquet")
    groups = [file.read_row_group(i)["class_index"].to_pylist() for i in range(file.num_row_groups)]
    assert groups == [[0] * 4, [1] * 4]


def test_a_row_group_holds_a_whole_class_whatever_the_order_of_the_images(tmp_path: Path):
    order = torch.tensor([5, 0, 2, 4, 1, 3])
    fields = ("images", "labels", "patch_order", "teacher_logits", "flipped_logits", "loss_ce", "loss_prior")
    shuffled = replace(CATS, **{name: getattr(CATS, name)[order] for name in fields})
    write_synthetic(str(tmp_path / "a.parquet"), shuffled, CAT_SPEC, seed=5, identity=IDENTITY)
    file = pq.ParquetFile(tmp_path / "a.parquet")
    groups = [file.read_row_group(i).to_pylist() for i in range(file.num_row_groups)]
    assert [[row["class_index"] for row in group] for group in groups] == [[2, 2], [0, 0], [1, 1]]
    firsts = [group[0]["teacher_logits"][0] for group in groups]
    assert firsts == [5.0, 0.0, 2.0], "a row keeps its own values"


def test_synthetic_images_can_be_read_as_labelled_images(root: str):
    """They are in the Hugging Face Image convention; only the label is under another name."""
    path = Path(root) / "labelled.parquet"
    table = pq.read_table(f"{root}/cats-111111111111.parquet")
    pq.write_table(table.rename_columns({"class_name": "label"}), path)
    data = load_data(DataConfig(source=str(path)))
    assert data.class_names == ("lion", "lynx", "tiger")
    assert torch.equal(data.pixels(range(6), 8), CATS.images)


def test_the_same_twice_is_the_same_bytes(root: str, tmp_path: Path):
    write_synthetic(str(tmp_path / "again" / "cats-111111111111.parquet"), CATS, CAT_SPEC, seed=5, identity=IDENTITY)
    assert (tmp_path / "again" / "cats-111111111111.parquet").read_bytes() == (
        tmp_path / "cats-111111111111.parquet"
    ).read_bytes()


def test_a_pool_of_adapters_with_different_numbers_of_classes(root: str):
    pool = read_pool(root, ["cats-111111111111.parquet", "dogs-222222222222.parquet"])
    assert torch.equal(pool.images, torch.cat([CATS.images, DOGS.images]))
    assert pool.images.dtype == torch.uint8
    assert pool.class_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert pool.class_names == ("lion", "tiger", "lynx", "wolf", "lynx")
    assert pool.adapter_of.tolist() == [0, 0, 0, 1, 1]
    assert pool.slot_of.tolist() == [0, 1, 2, 0, 1]
    assert pool.teacher_logits.dtype == torch.float32
    assert torch.equal(pool.teacher_logits[:6], CATS.teacher_logits)
    assert torch.equal(pool.teacher_logits[6:, :2], DOGS.teacher_logits)
    assert (pool.teacher_logits[6:, 2] == 0).all()
    assert torch.equal(pool.flipped_logits, -pool.teacher_logits)
    assert pool.patch_order.dtype == torch.int64
    assert torch.equal(pool.patch_order, torch.cat([CATS.patch_order, DOGS.patch_order]))


def test_a_pool_follows_the_order_of_the_files(root: str):
    pool = read_pool(root, ["dogs-222222222222.parquet", "cats-111111111111.parquet"])
    assert pool.class_names == ("wolf", "lynx", "lion", "tiger", "lynx")
    assert pool.adapter_of.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(pool.images[:8], DOGS.images)


def test_a_pool_of_one_file(root: str):
    pool = read_pool(root, ["dogs-222222222222.parquet"])
    assert pool.class_of.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert pool.teacher_logits.shape == (8, 2)


def test_the_first_classes_of_each_adapter(root: str):
    files = ["dogs-222222222222.parquet", "cats-111111111111.parquet"]
    dogs, cats = read_first_classes(root, files, most=2)
    assert [(found.adapter, found.name) for found in (*dogs, *cats)] == [
        ("dogs", "wolf"), ("dogs", "lynx"), ("cats", "lion"), ("cats", "tiger"),
    ]  # fmt: skip
    assert torch.equal(torch.cat([found.images for found in dogs]), DOGS.images)
    assert cats[1].patch_order is not None
    assert torch.equal(cats[1].patch_order, CATS.patch_order[2:4])


def test_images_of_different_sizes(root: str):
    write_synthetic(
        f"{root}/birds-333333333333.parquet",
        draw(2, 1, side_px=6),
        spec_of("birds", ("owl", "hawk")),
        seed=0,
        identity=IDENTITY,
    )
    with pytest.raises(StorageError, match=r"different sizes \[\(3, 6, 6\), \(3, 8, 8\)\]; invert all at one image_px"):
        read_pool(root, ["cats-111111111111.parquet", "birds-333333333333.parquet"])


@pytest.mark.parametrize("size", [0, 3, 500, -1])
def test_a_truncated_file_is_named(root: str, size: int):
    path = Path(root) / "cats-111111111111.parquet"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StorageError, match=rf"synthetic images {path}: .*run `lr-ray invert` again"):
        read_pool(root, ["dogs-222222222222.parquet", "cats-111111111111.parquet"])
    with pytest.raises(StorageError, match=rf"synthetic images {path}: .*run `lr-ray invert` again"):
        read_index(root, ["dogs-222222222222.parquet", "cats-111111111111.parquet"], IDENTITY)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"text": ["a"]}),
        pa.table({"image": [b"x"], "class_index": [0]}),
        pa.table({"class_index": ["zero"]}),
        pa.table({"class_index": pa.array([], pa.int32())}),
    ],
    ids=["other columns", "other types", "text", "no rows"],
)
def test_a_file_that_is_not_of_synthetic_images_is_named(root: str, table: pa.Table):
    pq.write_table(table, f"{root}/other.parquet")
    with pytest.raises(StorageError, match=rf"{root}/other\.parquet.*run `lr-ray invert` again"):
        read_pool(root, ["cats-111111111111.parquet", "other.parquet"])
    with pytest.raises(StorageError, match=rf"{root}/other\.parquet.*run `lr-ray invert` again"):
        read_index(root, ["cats-111111111111.parquet", "other.parquet"], IDENTITY)


def test_a_file_damaged_anywhere_is_named(root: str):
    """Its pages, what they hold, or its footer: byte by byte, a run of zeros for what was there."""
    path = Path(root, "cats-111111111111.parquet")
    whole, messages, undamaged = path.read_bytes(), [], read_pool(root, [path.name])
    for start in range(4, len(whole) - 8, 97):
        path.write_bytes(whole[:start] + bytes(40) + whole[start + 40 :])
        try:
            found = read_pool(root, [path.name])
        except StorageError as error:
            messages.append(str(error))
        else:
            assert torch.equal(found.images, undamaged.images), start
            assert torch.equal(found.teacher_logits, undamaged.teacher_logits), start
            assert found.class_names == undamaged.class_names, start
    assert len(messages) > 10
    assert all("run `lr-ray invert` again" in message and "\n" not in message for message in messages)


def test_a_missing_file(root: str):
    with pytest.raises(StorageError, match=r"cannot read .*birds-333333333333\.parquet"):
        read_pool(root, ["birds-333333333333.parquet"])


def test_the_index_tells_every_class_from_the_footers(root: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("rows are read")

    for name in ("read", "read_row_group", "read_row_groups", "iter_batches"):
        monkeypatch.setattr(pq.ParquetFile, name, refuse)
    monkeypatch.setattr(pq, "read_table", refuse)
    index = read_index(root, ["dogs-222222222222.parquet", "cats-111111111111.parquet"], IDENTITY)
    assert [(ref.file, ref.adapter, ref.slot, ref.name, ref.num_images) for ref in index] == [
        ("dogs-222222222222.parquet", "dogs", 0, "wolf", 4),
        ("dogs-222222222222.parquet", "dogs", 1, "lynx", 4),
        ("cats-111111111111.parquet", "cats", 0, "lion", 2),
        ("cats-111111111111.parquet", "cats", 1, "tiger", 2),
        ("cats-111111111111.parquet", "cats", 2, "lynx", 2),
    ]


def test_classes_of_an_adapter_in_several_files_come_in_their_order(tmp_path: Path):
    birds = spec_of("birds", ("owl", "hawk", "crow"))
    whole = draw(3, 2, seed=4)
    for name, chosen in (("birds-bbbbbbbbbbbb.parquet", [4, 5]), ("birds-aaaaaaaaaaaa.parquet", [0, 1, 2, 3])):
        fields = ("images", "labels", "patch_order", "teacher_logits", "flipped_logits", "loss_ce", "loss_prior")
        part = replace(whole, **{field: getattr(whole, field)[chosen] for field in fields})
        write_synthetic(str(tmp_path / name), part, birds, seed=5, identity=IDENTITY)
    files = ["birds-bbbbbbbbbbbb.parquet", "birds-aaaaaaaaaaaa.parquet"]
    index = read_index(str(tmp_path), files, IDENTITY)
    assert [(ref.slot, ref.file) for ref in index] == [(0, files[1]), (1, files[1]), (2, files[0])]
    assert [ref.name for ref in index] == list(read_pool(str(tmp_path), files).class_names)


def test_classes_are_read_by_themselves(root: str, monkeypatch: pytest.MonkeyPatch):
    index = read_index(root, ["cats-111111111111.parquet"], IDENTITY)
    groups, read_row_group = [], pq.ParquetFile.read_row_group

    def watched(file: pq.ParquetFile, group: int, *arguments: Any, **options: Any) -> pa.Table:
        groups.append(group)
        return read_row_group(file, group, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    lynx, lion = read_classes(root, [index[2], index[0]])
    assert sorted(groups) == [index[0].row_group, index[2].row_group]
    assert torch.equal(lynx.images, CATS.images[4:])
    assert torch.equal(lynx.teacher_logits, CATS.teacher_logits[4:])
    assert torch.equal(lynx.flipped_logits, CATS.flipped_logits[4:])
    assert torch.equal(lynx.patch_order, CATS.patch_order[4:])
    assert (lynx.name, lynx.adapter, lynx.slot, lynx.num_images) == ("lynx", "cats", 2, 2)
    assert torch.equal(lion.images, CATS.images[:2])


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"digest": "another", "image_px": 8}, "of digest of the backb, but the config's has another"),
        ({"digest": "of the backbone", "image_px": 16}, "of image_px 8, but the config's has 16"),
    ],
)
def test_images_of_another_backbone_or_size_are_refused(root: str, identity: dict[str, str | int], message: str):
    with pytest.raises(
        StorageError, match=rf"cats-111111111111.parquet were made with a backbone {message}; correct the config's"
    ):
        read_index(root, ["cats-111111111111.parquet"], identity)


def test_an_index_that_is_not_true_any_more(root: str):
    (first, *_) = read_index(root, ["cats-111111111111.parquet"], IDENTITY)
    wrong = ClassRef(file=first.file, row_group=0, adapter="cats", slot=0, name="lion", num_images=3)
    with pytest.raises(StorageError, match="changed while they were read; run the same command again"):
        read_classes(root, [wrong])
    Path(root, "cats-111111111111.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match=r"synthetic images .*cats-111111111111.parquet: .*run `lr-ray invert` again"):
        read_classes(root, [first])


def test_a_row_group_of_two_classes_is_refused(root: str):
    table = pq.read_table(f"{root}/cats-111111111111.parquet")
    pq.write_table(table, f"{root}/cats-111111111111.parquet")
    with pytest.raises(StorageError, match="row group 0 is not one class; remove the file and invert again"):
        read_index(root, ["cats-111111111111.parquet"], IDENTITY)


def test_the_files_of_a_set(root: str):
    (Path(root) / "lr_ray.json").write_text("{}")
    assert list_synthetic(root) == ["cats-111111111111.parquet", "dogs-222222222222.parquet"]
    assert count_images(root, ["cats-111111111111.parquet", "dogs-222222222222.parquet"]) == 14
    assert count_images(root, ["cats-111111111111.parquet"]) == 6


@pytest.mark.parametrize("folder", ["", "absent"])
def test_an_empty_folder(tmp_path: Path, folder: str):
    with pytest.raises(StorageError, match=r"no Parquet files; run `lr-ray invert` first"):
        list_synthetic(str(tmp_path / folder))


def test_a_class_of_an_adapter_in_two_files_is_refused(root: str):
    again = f"{root}/cats-333333333333.parquet"
    write_synthetic(again, CATS, CAT_SPEC, seed=7, identity=IDENTITY)
    with pytest.raises(
        StorageError, match="both hold class lion of adapter cats; they are of different runs: remove those of one"
    ):
        read_index(root, list_synthetic(root), IDENTITY)


def test_a_file_of_another_name_is_refused(root: str):
    Path(root, "cats-111111111111.parquet").rename(Path(root, "mice-111111111111.parquet"))
    with pytest.raises(StorageError, match="are of adapter cats, not of mice as the file's name says; give it the name"):
        read_index(root, list_synthetic(root), IDENTITY)
