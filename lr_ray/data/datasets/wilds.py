"""The WILDS datasets that label images with classes, in the `official` split scheme."""

from collections.abc import Iterator
from pathlib import Path

from lr_ray.data.datasets.items import Item, inside
from lr_ray.data.datasets.tables import rows

_CAMELYON_SPLITS = {"0": "train", "1": "id_val"}
_CAMELYON_HOSPITALS = {"1": "val", "2": "test"}


def iwildcam(folder: Path, split: str) -> Iterator[Item]:
    """metadata.csv (split, filename, y), all images in train/; classes are the numbers of column y."""
    for row in rows(folder / "metadata.csv", ("split", "filename", "y")):
        if split in ("all", row["split"]):
            yield Item(inside(folder, f"train/{row['filename']}", "metadata.csv"), row["y"])


def camelyon17(folder: Path, split: str) -> Iterator[Item]:
    """metadata.csv (patient, node, x_coord, y_coord, tumor, center, split): hospital 1 validates, 2 tests."""
    columns = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
    for row in rows(folder / "metadata.csv", columns):
        its = _CAMELYON_HOSPITALS.get(row["center"]) or _CAMELYON_SPLITS.get(row["split"])
        if split in ("all", its):
            slide = f"patient_{row['patient'].zfill(3)}_node_{row['node']}"
            path = f"patches/{slide}/patch_{slide}_x_{row['x_coord']}_y_{row['y_coord']}.png"
            yield Item(inside(folder, path, "metadata.csv"), "tumor" if row["tumor"] == "1" else "normal")


def rxrx1(folder: Path, split: str) -> Iterator[Item]:
    """metadata.csv (dataset, experiment, plate, well, site, sirna_id): the training experiments' second site is id_test."""
    columns = ("dataset", "experiment", "plate", "well", "site", "sirna_id")
    for row in rows(folder / "metadata.csv", columns):
        its = "id_test" if row["dataset"] == "train" and row["site"] == "2" else row["dataset"]
        if split in ("all", its):
            path = f"images/{row['experiment']}/Plate{row['plate']}/{row['well']}_s{row['site']}.png"
            yield Item(inside(folder, path, "metadata.csv"), row["sirna_id"])


def fmow(folder: Path, split: str) -> Iterator[Item]:
    """rgb_metadata.csv (split, category, timestamp), row N is images/rgb_img_N.png; from 2013 validates, from 2016 tests."""
    for number, row in enumerate(rows(folder / "rgb_metadata.csv", ("split", "category", "timestamp"))):
        its = _fmow_split(row["split"], row["timestamp"][:4])
        if its and split in ("all", its):
            yield Item(folder / "images" / f"rgb_img_{number}.png", row["category"])


def _fmow_split(authors: str, year: str) -> str | None:
    """None: an image that the official scheme leaves out."""
    era = "test" if year >= "2016" else "val" if year >= "2013" else "id"
    if era == "id":
        return {"train": "train", "val": "id_val", "test": "id_test"}.get(authors)
    return era if authors == era else None
