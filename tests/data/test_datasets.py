"""The datasets by name, each on a small sample made in the layout that its authors publish."""

import csv
import inspect
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as torchvision_datasets

from lr_ray.config import load_config
from lr_ray.data.datasets.catalogue import DATASETS
from lr_ray.data.datasets.library import find, splits_of
from lr_ray.data.datasets.splits import class_lists, entry_of, source_of
from lr_ray.data.images import DataConfig, LabelledImages
from lr_ray.data.load import load_data
from lr_ray.errors import DataError

DATA = Path(os.environ.get("LR_RAY_DATA", Path(__file__).parents[3] / "shared" / "data"))
ISIC_TRUTH = "ISIC2018_Task3_Training_GroundTruth"
Make = Callable[[Path], None]


def load(source: str, root: object = None, classes: Any = None) -> LabelledImages:
    return load_data(DataConfig(source=source, root=None if root is None else str(root), classes=classes))


def picture(file: Path, red: int = 0, size: tuple[int, int] = (6, 6)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(file, **({"quality": 100} if file.suffix.lower() in (".jpg", ".jpeg") else {}))


def table(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as content:
        writer = csv.DictWriter(content, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def reds(data: LabelledImages) -> list[int]:
    return [int(value) for value in data.pixels(range(len(data)), 6)[:, 0, 2, 2]]


def tree(*folders: str, suffix: str = ".png", images: int = 1) -> Make:
    """Each folder with images."""

    def make(root: Path) -> None:
        for folder in folders:
            for number in range(images):
                picture(root / folder / f"{number}{suffix}")

    return make


def listed(name: str, *, under: str = "", suffix: str = ".png") -> Make:
    """A folder with an image for every class of the lists of a split."""
    every = [class_name for classes in class_lists(name).values() for class_name in classes]
    return tree(*(f"{under}{class_name}" for class_name in every), suffix=suffix)


def omniglot(root: Path) -> None:
    """Every character of the Vinyals split in Lake's two folders."""
    part_of = {alphabet: part for part, alphabets in class_lists("omniglot-parts").items() for alphabet in alphabets}
    for character in (c for classes in class_lists("omniglot").values() for c in classes):
        picture(root / f"images_{part_of[character.partition('/')[0]]}" / character / "0001_01.png", size=(2, 2))


def mini_imagenet(root: Path) -> None:
    for split, classes in class_lists("miniimagenet").items():
        table(root / f"{split}.csv", [{"filename": f"{c}00000005.jpg", "label": c} for c in classes])
        for class_name in classes:
            picture(root / "images" / f"{class_name}00000005.jpg")


def chest_x(root: Path) -> None:
    findings = [*class_lists("chestx")["test"], "Pneumonia", "No Finding", "Mass|Nodule", "Mass"]
    table(root / "Data_Entry_2017.csv", [{"Image Index": f"{i}.png", "Finding Labels": f} for i, f in enumerate(findings)])
    for i in range(len(findings)):
        picture(root / ("images_001" if i % 2 else "images_002") / "images" / f"{i}.png", red=i)


def isic(root: Path) -> None:
    diagnoses = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    rows = [{"image": f"ISIC_{d}"} | {other: str(float(other == d)) for other in diagnoses} for d in diagnoses]
    table(root / ISIC_TRUTH / f"{ISIC_TRUTH}.csv", rows)
    for diagnosis in diagnoses:
        picture(root / "ISIC2018_Task3_Training_Input" / f"ISIC_{diagnosis}.jpg")


def flowers(root: Path) -> None:
    labels = np.array([[*range(1, 103), 7]], dtype=np.uint8)
    for number in range(1, labels.size + 1):
        picture(root / "jpg" / f"image_{number:05d}.jpg", red=number)
    savemat(root / "imagelabels.mat", {"labels": labels})


def aircraft(root: Path) -> None:
    every = [variant for classes in class_lists("meta-aircraft").values() for variant in classes]
    data = root / "fgvc-aircraft-2013b" / "data"
    for number in range(len(every)):
        file = data / "images" / f"{number:07d}.jpg"
        picture(file, size=(20, 16))
        image = Image.open(file)
        image.paste((200, 0, 0), (8, 4, 17, 13))
        image.save(file, quality=100)
    lines = [f"{number:07d} {variant}\n" for number, variant in enumerate(every)]
    (data / "images_variant_trainval.txt").write_text("".join(lines[:60]))
    (data / "images_variant_test.txt").write_text("".join(lines[60:]))
    (data / "variants.txt").write_text("".join(f"{variant}\n" for variant in every))
    (data / "images_box.txt").write_text("".join(f"{number:07d} 8 4 16 12\n" for number in range(len(every))))


def fungi(root: Path) -> None:
    categories = [{"id": number, "name": f"Species {number}"} for number in range(1394)]
    for part, numbers in (("train", range(0, 1394, 2)), ("val", range(1, 1394, 2))):
        images = [{"id": number, "file_name": f"images/{number:04d}_Species/a.JPG"} for number in numbers]
        annotations = [{"image_id": number, "category_id": number} for number in numbers]
        content = {"categories": categories, "images": images, "annotations": annotations}
        (root / "fungi").mkdir(exist_ok=True)
        (root / "fungi" / f"{part}.json").write_text(json.dumps(content))
    picture(root / "fungi" / "images" / "0004_Species" / "a.JPG", red=90)


def coco(root: Path) -> None:
    names = [name for classes in class_lists("meta-mscoco").values() for name in classes]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    boxes = [{"image_id": 9, "category_id": c["id"], "bbox": [10, 10, 10, 10]} for c in categories]
    boxes.append({"image_id": 9, "category_id": 1, "bbox": [3, 3, 0, 4]})
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps({"categories": categories, "annotations": boxes}))
    image = Image.new("RGB", (30, 30))
    image.paste((150, 0, 0), (9, 9, 21, 21))
    (root / "train2017").mkdir()
    image.save(root / "train2017" / "000000000009.jpg", quality=100)


def quick_draw(root: Path) -> None:
    for number, name in enumerate(name for classes in class_lists("meta-quickdraw").values() for name in classes):
        (root / "quickdraw").mkdir(exist_ok=True)
        rows = 1 + number % 2
        np.save(root / "quickdraw" / f"{name}.npy", np.full((rows, 784), number % 250, dtype=np.uint8))


def domain_net(root: Path) -> None:
    for part, classes in (("train", ("axe", "The_Mona_Lisa")), ("test", ("axe",))):
        lines = [f"sketch/{name}/sketch_{part}_{name}.jpg {label}\n" for label, name in enumerate(classes)]
        (root / f"sketch_{part}.txt").write_text("".join(lines))
        for name in classes:
            picture(root / "sketch" / name / f"sketch_{part}_{name}.jpg")


def iwildcam(root: Path) -> None:
    parts = ("train", "val", "test", "id_val", "id_test", "train")
    rows = [{"split": part, "filename": f"{i}.jpg", "y": i % 3} for i, part in enumerate(parts)]
    table(root / "iwildcam_v2.0" / "metadata.csv", rows)
    for i in range(len(parts)):
        picture(root / "iwildcam_v2.0" / "train" / f"{i}.jpg")


def camelyon17(root: Path) -> None:
    folder = root / "camelyon17_v1.0"
    cells = [("0", "0", "1"), ("0", "1", "0"), ("1", "0", "1"), ("2", "0", "0"), ("3", "0", "0")]
    rows = [
        {"": i, "patient": "004", "node": 4, "x_coord": i, "y_coord": 7, "tumor": tumor, "center": center, "split": split}
        for i, (center, split, tumor) in enumerate(cells)
    ]
    table(folder / "metadata.csv", rows)
    for i in range(len(rows)):
        picture(folder / "patches" / "patient_004_node_4" / f"patch_patient_004_node_4_x_{i}_y_7.png")


def rxrx1(root: Path) -> None:
    folder = root / "rxrx1_v1.0"
    parts = [("train", 1), ("train", 2), ("val", 1), ("val", 2), ("test", 2)]
    rows = [
        {"dataset": part, "experiment": f"HEPG2-0{i}", "plate": 1, "well": "B02", "site": site, "sirna_id": i}
        for i, (part, site) in enumerate(parts)
    ]
    table(folder / "metadata.csv", rows)
    for i, (_, site) in enumerate(parts):
        picture(folder / "images" / f"HEPG2-0{i}" / "Plate1" / f"B02_s{site}.png")


def fmow(root: Path) -> None:
    folder = root / "fmow_v1.1"
    years = {"train": (2012, 2014, 2017), "val": (2012, 2013, 2016), "test": (2009, 2015, 2016), "seq": (2012,)}
    parts = [(split, year) for split, of_split in years.items() for year in of_split]
    rows = [
        {"split": split, "category": "zoo" if i % 2 else "dam", "timestamp": f"{year}-01-01T00:00:00Z"}
        for i, (split, year) in enumerate(parts)
    ]
    table(folder / "rgb_metadata.csv", rows)
    for i in range(len(rows)):
        picture(folder / "images" / f"rgb_img_{i}.png", red=i)


META_SIZES = {
    "aircraft": (70, 15, 15),
    "cu_birds": (140, 30, 30),
    "dtd": (33, 7, 7),
    "fungi": (994, 200, 200),
    "ilsvrc_2012": (712, 158, 130),
    "mscoco": (40, 40),
    "quickdraw": (241, 52, 52),
    "traffic_sign": (43,),
    "vgg_flower": (71, 15, 16),
}
"""Of Meta-Dataset's splits, from its paper (table 1 of its appendix); Omniglot's are lists of alphabets."""

SAMPLES: dict[str, tuple[Make, dict[str, int]]] = {
    "cifar-fs": (listed("cifar-fs", under="data/"), {"train": 64, "val": 16, "test": 20}),
    "miniimagenet": (mini_imagenet, {"train": 64, "val": 16, "test": 20}),
    "vgg-flower": (flowers, {"train": 71, "val": 15, "test": 16}),
    "cub": (listed("cub", under="CUB_200_2011/images/", suffix=".jpg"), {"train": 100, "val": 50, "test": 50}),
    "omniglot": (omniglot, {"train": 1028, "val": 172, "test": 423}),
    "omniglot-parts": (omniglot, {"background": 964, "evaluation": 659}),
    "chestx": (chest_x, {"test": 7, "all": 8}),
    "isic": (isic, {"all": 7}),
    "eurosat": (tree("2750/AnnualCrop", "2750/River", suffix=".jpg"), {"all": 2}),
    "cropdiseases": (tree("dataset/train/Apple___Apple_scab", "dataset/train/Tomato___healthy", suffix=".JPG"), {"all": 2}),
    "meta-dataset/ilsvrc_2012": (
        listed("meta-ilsvrc_2012", under="ILSVRC2012_img_train/"),
        {"train": 712, "val": 158, "test": 130},
    ),
    "meta-dataset/omniglot": (omniglot, {"train": 883, "val": 81, "test": 659}),
    "meta-dataset/aircraft": (aircraft, {"train": 70, "val": 15, "test": 15}),
    "meta-dataset/cu_birds": (listed("cub", under="CUB_200_2011/images/"), {"train": 140, "val": 30, "test": 30}),
    "meta-dataset/dtd": (listed("meta-dtd", under="dtd/images/"), {"train": 33, "val": 7, "test": 7}),
    "meta-dataset/quickdraw": (quick_draw, {"train": 241, "val": 52, "test": 52}),
    "meta-dataset/fungi": (fungi, {"train": 994, "val": 200, "test": 200}),
    "meta-dataset/vgg_flower": (flowers, {"train": 71, "val": 15, "test": 16}),
    "meta-dataset/traffic_sign": (
        listed("meta-traffic_sign", under="GTSRB/Final_Training/Images/", suffix=".ppm"),
        {"test": 43},
    ),
    "meta-dataset/mscoco": (coco, {"val": 40, "test": 40}),
    "domainnet/sketch": (domain_net, {"train": 2, "test": 1, "all": 2}),
    "wilds/iwildcam": (iwildcam, {"train": 2, "val": 1, "test": 1, "id_val": 1, "id_test": 1, "all": 3}),
    "wilds/camelyon17": (camelyon17, {"train": 2, "id_val": 1, "val": 1, "test": 1, "all": 2}),
    "wilds/rxrx1": (rxrx1, {"train": 1, "id_test": 1, "val": 2, "test": 1, "all": 5}),
    "wilds/fmow": (fmow, {"train": 1, "id_val": 1, "id_test": 1, "val": 1, "test": 1, "all": 2}),
}
"""Name → the sample, and how many classes each split finds in it."""


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name → the folder of its sample; the same sample is made once."""
    made: dict[Make, Path] = {}

    def folder(name: str) -> Path:
        make = SAMPLES[name][0]
        if make not in made:
            made[make] = tmp_path_factory.mktemp("sample")
            make(made[make])
        return made[make]

    return folder


# ---------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(("name", "split"), [(name, split) for name, (_, counts) in SAMPLES.items() for split in counts])
def test_a_split_of_a_sample(sample: Callable[[str], Path], name: str, split: str):
    data = load(f"{name}/{split}", sample(name))
    assert len(data.class_names) == len(set(data.class_names)) == SAMPLES[name][1][split]
    assert sorted(set(data.labels.tolist())) == list(range(len(data.class_names)))
    assert list(data.class_names) == sorted(data.class_names)
    assert data.name == f"{name}/{split}"
    assert str(sample(name)) in data.describe(0)
    if name != "meta-dataset/fungi":  # one of whose 1,394 images is there
        assert data.pixels([0, len(data) - 1], 6).shape == (2, 3, 6, 6)
        assert data.digest() == load(f"{name}/{split}", sample(name)).digest()


def test_wilds_gives_each_image_to_its_split_and_class(sample: Callable[[str], Path]):
    def found(name: str, split: str) -> list[tuple[str, str]]:
        data = load(f"{name}/{split}", sample(name))
        return sorted((data.class_names[label], Path(data.describe(i)).name) for i, label in enumerate(data.labels))

    patch = "patch_patient_004_node_4_x_{}_y_7.png".format
    camelyon = {
        "train": [("normal", patch(4)), ("tumor", patch(0))],
        "id_val": [("normal", patch(1))],
        "val": [("tumor", patch(2))],
        "test": [("normal", patch(3))],
    }
    assert {split: found("wilds/camelyon17", split) for split in camelyon} == camelyon
    rxrx = {
        "train": [("0", "B02_s1.png")],
        "id_test": [("1", "B02_s2.png")],
        "val": [("2", "B02_s1.png"), ("3", "B02_s2.png")],
        "test": [("4", "B02_s2.png")],
    }
    assert {split: found("wilds/rxrx1", split) for split in rxrx} == rxrx


def test_every_dataset_has_a_sample():
    other_domains = {f"domainnet/{domain}" for domain in ("clipart", "infograph", "painting", "quickdraw", "real")}
    assert set(SAMPLES) == set(DATASETS) - other_domains
    for name, (_, counts) in SAMPLES.items():
        assert set(counts) | {"all"} == set(splits_of(DATASETS[name]))


def test_without_a_split_all_classes_are_read_and_classes_still_selects(sample: Callable[[str], Path]):
    assert len(load("cub", sample("cub")).class_names) == len(load("cub", f"file://{sample('cub')}").class_names) == 200
    chosen = load("cub/test", sample("cub"), ["004.*", "48:"])
    assert chosen.class_names == ("004.Groove_billed_Ani", "196.House_Wren", "200.Common_Yellowthroat")
    assert chosen.name == "cub/test[004.*,48:]"


def test_splits_of_images_part_them(sample: Callable[[str], Path]):
    files = {
        split: {data.describe(i) for i in range(len(data))}
        for split in ("train", "id_val", "id_test", "val", "test", "all")
        for data in [load(f"wilds/fmow/{split}", sample("wilds/fmow"))]
    }
    assert {split: len(of_split) for split, of_split in files.items()} == dict.fromkeys(files, 1) | {"all": 5}
    assert files["all"] == set().union(*(of_split for split, of_split in files.items() if split != "all"))


def test_chest_x_leaves_out_images_of_several_findings_and_pneumonia(sample: Callable[[str], Path]):
    data = load("chestx/test", sample("chestx"))
    assert Counter(data.labels.tolist()) == dict.fromkeys(range(7), 1) | {data.class_names.index("Mass"): 2}
    assert reds(data) == [0, 1, 2, 3, 10, 4, 5, 6]  # 10.png before 4.png


def test_flowers_follow_the_labels(sample: Callable[[str], Path]):
    data = load("vgg-flower/train", sample("vgg-flower"), ["007.moon orchid"])
    assert [data.describe(i)[-15:] for i in range(2)] == ["image_00007.jpg", "image_00103.jpg"]


def test_aircraft_and_objects_are_cropped_to_their_boxes(sample: Callable[[str], Path]):
    plane = load("meta-dataset/aircraft/test", sample("meta-dataset/aircraft"))
    assert plane.open_image(0).size == (8, 8)
    assert plane.pixels([0], 8)[0, 0].float().mean() > 180
    thing = load("meta-dataset/mscoco/val", sample("meta-dataset/mscoco"), ["person"])
    assert len(thing) == 1
    assert thing.open_image(0).size == (12, 12)
    assert thing.pixels([0], 12)[0, 0].float().mean() > 130


def test_drawings_are_read_row_by_row(sample: Callable[[str], Path]):
    names = [name for classes in class_lists("meta-quickdraw").values() for name in classes]
    data = load("meta-dataset/quickdraw/test", sample("meta-dataset/quickdraw"))
    expected = [names.index(data.class_names[label]) % 250 for label in data.labels]
    assert [int(np.array(data.open_image(i))[0, 0]) for i in range(len(data))] == expected
    assert data.describe(len(data) - 1).endswith(f"{data.class_names[-1]}.npy")


@pytest.mark.parametrize(
    ("source", "make"),
    [
        ("miniimagenet/val", listed("miniimagenet")),
        ("miniimagenet/val", listed("miniimagenet", under="images/")),
        ("miniimagenet/val", listed("miniimagenet", under="data/")),
        ("eurosat", tree("eurosat/2750/AnnualCrop")),
        ("omniglot/val", lambda root: omniglot(root / "omniglot-py")),
        ("vgg-flower/val", lambda root: flowers(root / "flowers-102")),
        ("meta-dataset/dtd/val", listed("meta-dtd", under="dtd/dtd/images/")),
        ("meta-dataset/traffic_sign/test", listed("meta-traffic_sign", under="Final_Training/Images/", suffix=".ppm")),
        ("chestx/test", lambda root: (chest_x(root), (root / "images_001").rename(root / "images_003"))),
        ("cub/val", listed("cub", under="images/")),
    ],
)
def test_other_places_of_the_same_layout(tmp_path: Path, source: str, make: Make):
    """Of torchvision's downloads among them."""
    make(tmp_path)
    assert len(load(source, tmp_path)) > 0


@pytest.mark.parametrize(
    ("source", "make", "reference"),
    [
        ("eurosat", tree("eurosat/2750/AnnualCrop", "eurosat/2750/River", images=3), torchvision_datasets.EuroSAT),
        ("meta-dataset/aircraft", aircraft, partial(torchvision_datasets.FGVCAircraft, split="trainval")),
        ("meta-dataset/aircraft", aircraft, partial(torchvision_datasets.FGVCAircraft, split="test")),
    ],
)
def test_torchvision_reads_the_same_samples_alike(tmp_path: Path, source: str, make: Make, reference: Callable[..., Any]):
    """The same number of classes, and of those in torchvision's part, the same images of each."""
    make(tmp_path)
    data, theirs = load(source, tmp_path), reference(tmp_path)
    ours = {data.describe(i).partition(" (")[0]: label for i, label in enumerate(data.labels.tolist())}
    pairs = (
        getattr(theirs, "_samples", None)
        or getattr(theirs, "samples", None)
        or zip(theirs._image_files, theirs._labels, strict=True)
    )
    classes = {(label, ours[str(file)]) for file, label in pairs}
    assert len(classes) == len({label for label, _ in classes}) == len({label for _, label in classes}) > 1


def test_the_smaller_archive_of_torchvision_is_not_taken_for_the_traffic_signs(tmp_path: Path):
    listed("meta-traffic_sign", under="gtsrb/GTSRB/Training/", suffix=".ppm")(tmp_path)
    with pytest.raises(DataError, match=r"GTSRB_Final_Training_Images\.zip \(276 MB; torchvision's GTSRB is an older"):
        load("meta-dataset/traffic_sign", tmp_path)


def test_the_split_of_fungi_is_the_one_that_meta_dataset_has_now():
    """Its first, of the same sizes, had 144 of the present test classes among those to train on."""
    splits = {split: set(classes) for split, classes in class_lists("meta-fungi").items()}
    assert {"0008", "0009", "1388"} <= splits["test"]
    assert {"0000", "0004", "1379"} <= splits["val"]
    assert "0226" in splits["train"]


def test_mini_imagenet_in_folders_of_splits(tmp_path: Path):
    for split, classes in class_lists("miniimagenet").items():
        tree(*(f"{split}/{name}" for name in classes), suffix=".jpg")(tmp_path)
    assert load("miniimagenet/test", tmp_path).class_names == tuple(class_lists("miniimagenet")["test"])


def test_the_digest_follows_the_classes_and_content_of_the_split_alone(tmp_path: Path):
    listed("cub", under="images/")(tmp_path)
    train, val = load("cub/train", tmp_path).digest(), load("cub/val", tmp_path).digest()
    picture(tmp_path / "images" / class_lists("cub")["val"][0] / "0.png", red=9)
    assert load("cub/train", tmp_path).digest() == train
    assert load("cub/val", tmp_path).digest() != val


# ----------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("name", sorted({d.class_list for d in DATASETS.values() if d.class_list}))
def test_class_lists_are_disjoint_sorted_and_say_their_source(name: str):
    classes = [class_name for of_split in class_lists(name).values() for class_name in of_split]
    assert len(classes) == len(set(classes))
    assert all(list(of_split) == sorted(of_split) for of_split in class_lists(name).values())
    paper, source = source_of(name)
    assert paper
    assert source.startswith("https://")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("cifar-fs", (64, 16, 20)),
        ("miniimagenet", (64, 16, 20)),
        ("cub", (100, 50, 50)),
        ("omniglot", (1028, 172, 423)),
        ("omniglot-parts", (30, 20)),
        ("meta-omniglot", (25, 5, 20)),
        *((f"meta-{name}", sizes) for name, sizes in META_SIZES.items()),
    ],
)
def test_class_lists_have_the_sizes_of_the_literature(name: str, sizes: tuple[int, ...]):
    assert tuple(len(classes) for classes in class_lists(name).values()) == sizes


def test_cub_is_split_as_by_chen():
    """Of the classes in order, every second trains; of the others, every second validates."""
    ordered = sorted(name for classes in class_lists("cub").values() for name in classes)
    assert class_lists("cub") == {"train": ordered[::2], "val": ordered[1::4], "test": ordered[3::4]}


def test_mini_imagenet_and_meta_dataset_take_classes_of_imagenet():
    names = [class_name for classes in class_lists("meta-ilsvrc_2012").values() for class_name in classes]
    assert len(names) == 1000
    assert set(names) >= {class_name for classes in class_lists("miniimagenet").values() for class_name in classes}


@pytest.mark.parametrize(
    ("class_name", "entries", "entry"),
    [
        ("apple", {"apple", "pear"}, "apple"),
        ("0015.Agaricus moelleri", {"0015"}, "0015"),
        ("Greek/character01", {"Greek"}, "Greek"),
        ("Greek/character01", {"Greek/character01"}, "Greek/character01"),
        ("F-16A/B", {"F-16A/B"}, "F-16A/B"),
        ("apples", {"apple"}, None),
    ],
)
def test_what_a_list_may_name_a_class_by(class_name: str, entries: set[str], entry: str | None):
    assert entry_of(class_name, entries) == entry


def test_the_documentation_has_every_dataset_with_its_splits():
    lines = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text().splitlines()
    for name, dataset in DATASETS.items():
        row = next(line for line in lines if line.startswith(f"| `{name}` |"))
        sizes = SAMPLES.get(name, (None, {}))[1]
        for split in splits_of(dataset)[:-1]:
            assert (f"*{split}*" if split in dataset.parts else f"{split} {sizes[split]}") in row
        assert any(line.startswith(f"- {dataset.terms}: ") for line in lines)


# ---------------------------------------------------------------------------------------------------------- Parquet


def write_parquet(file: Path, classes: list[str], image: str = "image", label: str = "label") -> None:
    """An image of each class, labelled by number."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6)).save(buffer, format="PNG")
    columns = {
        image: [{"bytes": buffer.getvalue(), "path": f"{name}.png"} for name in classes],
        label: list(range(len(classes))),
    }
    features = {image: {"_type": "Image"}, label: {"names": classes, "_type": "ClassLabel"}}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), file
    )


def test_parquet_serves_in_the_place_of_the_authors_layout(tmp_path: Path):
    lists = class_lists("cifar-fs")
    write_parquet(tmp_path / "a.parquet", [*lists["train"], *lists["val"][:5]])
    write_parquet(tmp_path / "b.parquet", [*reversed(lists["val"])])
    data = load("cifar-fs/val", tmp_path)
    assert data.class_names == tuple(lists["val"])
    assert Counter(Counter(data.labels.tolist()).values()) == {1: 11, 2: 5}
    for i in range(len(data)):
        assert str(tmp_path) in data.describe(i)
    with pytest.raises(DataError, match=r"cifar-fs/test: no images|no images of the classes asked for"):
        load("cifar-fs/test", tmp_path)


def test_cifar_fs_of_the_hubs_cifar_100(tmp_path: Path):
    """Its columns are img and fine_label, its parts of images, its name of the crab is cra."""
    every = sorted(name for classes in class_lists("cifar-fs").values() for name in classes)
    for part in ("train", "test"):
        names = ["cra" if name == "crab" else name for name in every]
        write_parquet(tmp_path / "cifar100" / f"{part}-00000-of-00001.parquet", names, "img", "fine_label")
    for split, classes in class_lists("cifar-fs").items():
        data = load(f"cifar-fs/{split}", tmp_path)
        assert data.class_names == tuple(classes)
        assert Counter(data.labels.tolist()) == dict.fromkeys(range(len(classes)), 2)


@pytest.mark.parametrize(("split", "num_classes"), [("train", 64), ("val", 16)])
def test_cifar_fs_in_parquet_as_published(split: str, num_classes: int):
    if not (DATA / "cifar-fs" / f"{split}.parquet").exists():
        pytest.skip(f"{DATA}/cifar-fs/{split}.parquet does not exist; set LR_RAY_DATA to the folder that holds cifar-fs/")
    data = load(f"cifar-fs/{split}", DATA / "cifar-fs")
    alone = load(str(DATA / "cifar-fs" / f"{split}.parquet"))
    assert Counter(data.labels.tolist()) == dict.fromkeys(range(num_classes), 300)
    assert set(data.class_names) == set(alone.class_names) == set(class_lists("cifar-fs")[split])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A stand-in for the hub, whose one dataset has the CIFAR-FS classes; the calls that it gets."""
    write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", class_lists("cifar-fs")["test"])
    write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", class_lists("cifar-fs")["train"])
    calls: list[tuple[str, dict[str, Any]]] = []
    real = inspect.signature(huggingface_hub.snapshot_download)

    def snapshot_download(repo: str, **options: Any) -> str:
        real.bind(repo, **options)
        calls.append((repo, options))
        if repo != "someone/cifar":
            raise ConnectionError("no network")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    ("address", "revision", "pattern", "num_classes"),
    [
        ("hf://datasets/someone/cifar", None, "*.parquet", 84),
        ("hf://datasets/someone/cifar@1a2b/data/test-*", "1a2b", "data/test-*.parquet", 20),
        ("hf://datasets/someone/cifar@refs/convert/parquet/data", "refs/convert/parquet", "data*.parquet", 84),
    ],
)
def test_a_dataset_of_the_hub(hub: list[Any], address: str, revision: str | None, pattern: str, num_classes: int):
    data = load(address)
    assert len(data.class_names) == num_classes
    assert data.name == address.removeprefix("hf://datasets/")
    assert data.pixels([0], 6).shape == (1, 3, 6, 6)
    assert hub == [("someone/cifar", {"repo_type": "dataset", "revision": revision, "allow_patterns": [pattern]})]


def test_a_named_dataset_from_the_hub(hub: list[Any]):
    assert load("cifar-fs/test", "hf://datasets/someone/cifar").class_names == tuple(class_lists("cifar-fs")["test"])
    assert len(hub) == 1


def test_the_hub_is_asked_only_for_its_addresses(hub: list[Any], sample: Callable[[str], Path]):
    load("cub/test", sample("cub"))
    with pytest.raises(DataError):
        load("cub", "/no/such/folder")
    assert hub == []


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("source", "root", "message"),
    [
        ("cub/tset", None, r"no split 'tset' of cub; allowed: train, val, test, all$"),
        ("eurosat/test", None, r"no split 'test' of eurosat; allowed: all; the literature splits its classes in no one way"),
        ("cub/train/more", None, r"'cub/train/more': no such dataset; .*known: cifar-fs, "),
        ("meta-dataset/funghi", None, r"no such dataset; did you mean meta-dataset/fungi\?"),
        ("meta-dataset", None, r"'meta-dataset': no such dataset"),
        ("wilds/poverty/test", None, r"PovertyMap labels images with a number"),
        (
            "cub/test",
            None,
            r"where\? download CUB_200_2011\.tgz \(1\.2 GB\) from https.* set data\.SECTION\.root to its folder",
        ),
        ("cub/test", "/no/such", r"data cub/test: no folder /no/such; download CUB_200_2011\.tgz .* unpack it there"),
        ("miniimagenet", "{tmp}", r"has no images with \*\.csv nor n01532829 .*; download the images"),
        ("digits", "{tmp}", r"'digits': root .* is only for datasets by name"),
        ("hf://datasets/nobody/nothing", None, r"not fetched \(ConnectionError: no network\); see that the dataset exists"),
        ("hf://models/a/b", None, r"no dataset of the hub; expected hf://datasets/OWNER/NAME"),
        ("hf://datasets/someone/cifar/nope", None, r"no Parquet files there"),
        ("s3://bucket/cub", None, r"read from local files only"),
    ],
)
def test_error_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: list[Any], source: str, root: str | None, message: str
):
    monkeypatch.delenv("LR_RAY_DATA", raising=False)
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(DataError, match=message) as caught:
        load(source, root and root.format(tmp=folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_missing_says_what_to_download(tmp_path: Path, name: str):
    with pytest.raises(
        DataError, match=r"has no .+; download .+(https?|gs)://.+, and unpack it there, or set data\.SECTION\.root"
    ):
        load(name, tmp_path)


def test_classes_that_are_not_there_are_counted(tmp_path: Path):
    tree("images/001.Black_footed_Albatross", "images/003.Sooty_Albatross")(tmp_path)
    with pytest.raises(DataError, match=r"lacks 98 of its 100 classes \(005\.Crested_Auklet, .*, …\); download CUB_200_2011"):
        load("cub/train", tmp_path)
    with pytest.raises(DataError, match="no images of the classes asked for"):
        load("cub/test", tmp_path)


def spoil(file: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda root: (root / file).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", ""])
def test_a_list_that_leads_out_of_the_folder(tmp_path: Path, path: str):
    domain_net(tmp_path)
    spoil("sketch_train.txt", f"{path} 0\n")(tmp_path)
    with pytest.raises(DataError, match="only paths within the folder are read"):
        load("domainnet/sketch/train", tmp_path)


@pytest.mark.parametrize(
    ("source", "make", "change", "message"),
    [
        ("miniimagenet/val", mini_imagenet, spoil("val.csv", "filename,label\n../../x,n01855672\n"), "'images/../../x'"),
        ("miniimagenet/val", mini_imagenet, spoil("val.csv", "name,label\na,b\n"), "no column 'filename' among name, label"),
        ("miniimagenet/val", mini_imagenet, spoil("val.csv", "filename,label\na.jpg\n"), "line 2 has fewer values"),
        ("miniimagenet/val", mini_imagenet, spoil("val.csv", b"\xff\xfe"), r"val\.csv: unreadable"),
        (
            "chestx",
            chest_x,
            lambda root: (root / "images_001" / "images" / "1.png").unlink(),
            "lists '1.png', which is in no images folder",
        ),
        (
            "isic",
            isic,
            spoil(f"{ISIC_TRUTH}/{ISIC_TRUTH}.csv", "image,MEL,NV\nISIC_MEL,1.0,1.0\n"),
            "'ISIC_MEL' has 2 diagnoses",
        ),
        ("vgg-flower", flowers, spoil("imagelabels.mat", b"no matlab"), r"imagelabels\.mat: not as its authors publish it"),
        (
            "meta-dataset/aircraft",
            aircraft,
            spoil("fgvc-aircraft-2013b/data/images_box.txt", "0000000 1 2 3\n"),
            "no box of four numbers for '0000000'",
        ),
        ("meta-dataset/fungi", fungi, spoil("fungi/val.json", "[]"), r"val\.json: not as its authors publish it"),
        ("meta-dataset/fungi", fungi, spoil("fungi/val.json", '{"categories": []}'), r"KeyError: 'images'"),
        ("meta-dataset/mscoco", coco, spoil("annotations/instances_train2017.json", "{"), "JSONDecodeError"),
        ("meta-dataset/quickdraw", quick_draw, spoil("quickdraw/yoga.npy", b"\x80\x04."), r"yoga\.npy: no NumPy array"),
        (
            "meta-dataset/quickdraw",
            quick_draw,
            lambda root: np.save(root / "quickdraw" / "yoga.npy", np.zeros((1, 4), dtype=np.uint8)),
            r"not \(N, 784\) uint8",
        ),
        (
            "meta-dataset/quickdraw",
            quick_draw,
            lambda root: np.save(root / "quickdraw" / "yoga.npy", np.array([object()]), allow_pickle=True),
            "no NumPy array .*Python objects",
        ),
    ],
)
def test_files_that_are_not_the_authors(
    tmp_path: Path, source: str, make: Make, change: Callable[[Path], object], message: str
):
    make(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        load(source, tmp_path)


def test_an_image_that_does_not_decode_is_named(tmp_path: Path):
    chest_x(tmp_path)
    spoil("images_001/images/1.png", b"")(tmp_path)
    with pytest.raises(DataError, match=r"images_001/images/1\.png does not decode"):
        load("chestx", tmp_path, ["Cardiomegaly"]).pixels([0], 6)


@pytest.mark.parametrize("box", ["nan 0 4 4", "0 0 inf inf", "inf inf inf inf", "9 9 2 2", "30 30 40 40"])
def test_a_box_that_is_none(tmp_path: Path, box: str):
    aircraft(tmp_path)
    boxes = tmp_path / "fgvc-aircraft-2013b" / "data" / "images_box.txt"
    boxes.write_text(boxes.read_text().replace("0000003 8 4 16 12", f"0000003 {box}"))
    data = load("meta-dataset/aircraft", tmp_path)
    index = next(i for i in range(len(data)) if "0000003.jpg" in data.describe(i))
    if box.startswith("0"):
        assert data.open_image(index).size == (20, 16)
    else:
        with pytest.raises(DataError, match=r"image .*0000003\.jpg"):
            data.pixels([index], 6)


def test_a_large_image_is_not_decoded_to_be_cropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    aircraft(tmp_path)
    monkeypatch.setattr("lr_ray.data.images.MAX_PIXELS", 100)
    monkeypatch.setattr("lr_ray.data.datasets.items.MAX_PIXELS", 100)
    with pytest.raises(DataError, match="has 20×16 pixels; at most 100 are allowed"):
        load("meta-dataset/aircraft", tmp_path).pixels([0], 6)


# --------------------------------------------------------------------------------------------------------- settings


def test_the_place_of_a_dataset_in_the_folder_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LR_RAY_DATA", str(tmp_path))
    listed("cub", under="cub/CUB_200_2011/images/")(tmp_path)
    fmow(tmp_path / "wilds")
    assert len(load("cub/test")) == 50
    assert len(load("wilds/fmow/test")) == 1
    (tmp_path / "domainnet").mkdir()
    domain_net(tmp_path / "domainnet")
    assert len(load("domainnet/sketch")) == 3


def test_a_path_that_exists_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tree("cub/a", "cub/b")(tmp_path)
    assert load("cub").class_names == ("a", "b")
    assert find("cub/test") == ("cub", "test")


@pytest.mark.parametrize(
    ("variable", "root", "expected"),
    [
        (None, None, None),
        ("/data", None, "/data/cub"),
        ("/data", "/mine", "/mine"),
        (None, "hf://datasets/a/b", "hf://datasets/a/b"),
    ],
)
def test_a_config_leaves_names_and_settles_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, root: str | None, expected: str | None
):
    monkeypatch.delenv("LR_RAY_DATA", raising=False)
    if variable:
        monkeypatch.setenv("LR_RAY_DATA", variable)
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps({"data": {"test": {"source": "cub/test", **({"root": root} if root else {})}}}))
    test = load_config(file).data.test
    assert test is not None
    assert (test.source, test.root) == ("cub/test", expected)
