"""Images labelled, and some cropped, by annotation files: Aircraft, Fungi, MS COCO, VGG Flower."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lr_ray.data.datasets.items import Item, inside
from lr_ray.data.datasets.splits import class_lists
from lr_ray.errors import DataError

_COCO_MARGIN = 1.2


def aircraft(folder: Path, _split: str) -> Iterator[Item]:
    """data/images_variant_{trainval,test}.txt, each image cropped to its box in data/images_box.txt, as Meta-Dataset does."""
    boxes = dict(_pairs(folder / "data" / "images_box.txt"))
    for name in ("images_variant_trainval.txt", "images_variant_test.txt"):
        for image, variant in _pairs(folder / "data" / name):
            try:
                left, upper, right, lower = (float(side) for side in boxes[image].split())
            except (KeyError, ValueError) as error:
                raise DataError(
                    f"data {folder}: images_box.txt has no box of four numbers for {image!r}; replace it"
                ) from error
            yield Item(inside(folder, f"data/images/{image}.jpg", name), variant, (left, upper, right, lower))


def fungi(folder: Path, _split: str) -> Iterator[Item]:
    """train.json and val.json of the 2018 FGVCx competition; classes `0000.Abortiporus biennis`."""
    for name in ("train.json", "val.json"):
        content = _json(folder / name)
        try:
            classes = {category["id"]: f"{category['id']:04d}.{category['name']}" for category in content["categories"]}
            files = {image["id"]: image["file_name"] for image in content["images"]}
            pairs = [(files[label["image_id"]], classes[label["category_id"]]) for label in content["annotations"]]
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed(folder / name, error) from error
        yield from (Item(inside(folder, file, name), class_name) for file, class_name in pairs)


def coco(folder: Path, _split: str) -> Iterator[Item]:
    """Every object of train2017/, cropped to 1.2 times its box, as Meta-Dataset does; some gigabytes of memory."""
    file = folder / "annotations" / "instances_train2017.json"
    content = _json(file)
    try:
        classes = {category["id"]: category["name"] for category in content["categories"]}
        objects = [(int(o["image_id"]), str(classes[o["category_id"]]), _widened(o["bbox"])) for o in content["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(file, error) from error
    for image, class_name, (left, upper, right, lower) in objects:
        if right - left >= 1 and lower - upper >= 1:
            yield Item(folder / "train2017" / f"{image:012d}.jpg", class_name, (left, upper, right, lower))


def flowers(folder: Path, _split: str) -> Iterator[Item]:
    """jpg/image_00001.jpg to the last label of imagelabels.mat; classes `001.pink primrose`."""
    from scipy.io import loadmat  # a second to import, which no other dataset should pay for

    file = folder / "imagelabels.mat"
    names = {int(name[:3]): name for names in class_lists("meta-vgg_flower").values() for name in names}
    try:
        labels = [names[int(label)] for label in loadmat(file)["labels"].ravel()]
    except Exception as error:  # whatever a damaged file makes of the parser
        raise _malformed(file, error) from error
    for number, name in enumerate(labels, start=1):
        yield Item(folder / "jpg" / f"image_{number:05d}.jpg", name)


def _widened(box: list[float]) -> tuple[float, float, float, float]:
    """From left, upper, width, height to the four sides of a box `_COCO_MARGIN` times as wide and high."""
    left, upper, width, height = (float(side) for side in box)
    across, down = width * (_COCO_MARGIN - 1) / 2, height * (_COCO_MARGIN - 1) / 2
    return left - across, upper - down, left + width + across, upper + height + down


def _pairs(table: Path) -> list[tuple[str, str]]:
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise _malformed(table, error) from error
    return [(first, rest) for first, _, rest in (line.strip().partition(" ") for line in lines) if first]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _malformed(file, error) from error
    if not isinstance(content, dict):
        raise _malformed(file, TypeError(f"a {type(content).__name__} at the top, no object"))
    return content


def _malformed(file: Path, error: Exception) -> DataError:
    return DataError(f"data {file}: not as its authors publish it ({type(error).__name__}: {error}); put their file there")
