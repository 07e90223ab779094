"""Images labelled in CSV files and lists."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from lr_ray.data.datasets.items import Item, inside
from lr_ray.errors import DataError


def mini_imagenet(folder: Path, _split: str) -> Iterator[Item]:
    """Ravi and Larochelle's train.csv, val.csv and test.csv (filename, label), those that are there, beside images/."""
    for name in ("train.csv", "val.csv", "test.csv"):
        if (folder / name).exists():
            for row in rows(folder / name, ("filename", "label")):
                yield Item(inside(folder, f"images/{row['filename']}", name), row["label"])


def chest_x(folder: Path, _split: str) -> Iterator[Item]:
    """Data_Entry_2017.csv beside images/, or beside the twelve images_0NN/images/; images with one finding only."""
    files = {
        file.name: file for pattern in ("images", "images_*/images") for part in folder.glob(pattern) for file in part.iterdir()
    }
    table = folder / "Data_Entry_2017.csv"
    for row in rows(table, ("Image Index", "Finding Labels")):
        name, findings = row["Image Index"], row["Finding Labels"].split("|")
        if len(findings) == 1 and findings != ["No Finding"]:
            if name not in files:
                raise DataError(
                    f"data {folder}: {table.name} lists {name!r}, which is in no images folder; unpack all the images there"
                )
            yield Item(files[name], findings[0])


def isic(folder: Path, _split: str) -> Iterator[Item]:
    """The ground truth of the 2018 challenge's task 3: a column of ones and zeros for each class."""
    name = "ISIC2018_Task3_Training_GroundTruth"
    table = folder / name / f"{name}.csv"
    for row in rows(table, ("image", "MEL", "NV")):
        image = row.pop("image")
        ones = [diagnosis for diagnosis, value in row.items() if value in ("1", "1.0")]
        if len(ones) != 1:
            raise DataError(
                f"data {table}: {image!r} has {len(ones)} diagnoses; exactly one is needed: mend or replace the table"
            )
        yield Item(inside(folder, f"ISIC2018_Task3_Training_Input/{image}.jpg", table.name), ones[0])


def domain_net(domain: str, folder: Path, split: str) -> Iterator[Item]:
    """DOMAIN_train.txt and DOMAIN_test.txt, lines of DOMAIN/CLASS/IMAGE.jpg and a label."""
    for part in ("train", "test") if split == "all" else (split,):
        table = folder / f"{domain}_{part}.txt"
        for line in filter(None, map(str.strip, _text(table).split("\n"))):
            path = inside(folder, line.rpartition(" ")[0], table.name)
            yield Item(path, path.parent.name)


def rows(table: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a CSV file with a header.

    Raises:
        DataError: unreadable, without the columns, or a row shorter than the header.
    """
    try:
        lines = csv.DictReader(io.StringIO(_text(table), newline=""))
        header, content = lines.fieldnames or (), list(lines)
    except csv.Error as error:
        raise DataError(f"data {table}: not CSV ({error}); put the authors' file there") from error
    if missing := [column for column in columns if column not in header]:
        raise DataError(
            f"data {table}: no column {missing[0]!r} among {', '.join(header) or 'none'}; needed: {', '.join(columns)}: "
            "put the authors' file there"
        )
    for number, row in enumerate(content, start=2):
        if None in row.values():
            raise DataError(f"data {table}: line {number} has fewer values than the header; put the authors' file there")
        yield {column: value.strip() for column, value in row.items() if column is not None}


def _text(table: Path) -> str:
    try:
        return table.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"data {table}: unreadable ({error}); put the authors' file there") from error
