"""From a `DataConfig` to images."""

from pathlib import Path

from lr_ray.data.datasets.catalogue import DATASETS
from lr_ray.data.datasets.hub import HUB, load_hub
from lr_ray.data.datasets.library import load_dataset, names_dataset
from lr_ray.data.digits import load_digits
from lr_ray.data.folder import load_folder
from lr_ray.data.glyphs import load_glyphs
from lr_ray.data.images import DataConfig, LabelledImages
from lr_ray.data.parquet import load_parquet
from lr_ray.errors import DataError, did_you_mean

EMBEDDED_DATA = {"glyphs": load_glyphs, "digits": load_digits}


def load_data(config: DataConfig) -> LabelledImages:
    """The images of `config.source`, its classes selected.

    Raises:
        DataError: no such data, not readable as images, or no such class.
    """
    return _load(config.source, config.root).select(config.classes)


def _load(source: str, root: str | None) -> LabelledImages:
    source = source.removeprefix("file://")
    if names_dataset(source):
        return load_dataset(source, root)
    if root is not None:
        raise DataError(f"data {source!r}: root {root!r} is only for datasets by name (cub, …); leave it out, or name one")
    if source in EMBEDDED_DATA:
        return EMBEDDED_DATA[source]()
    if source.startswith(HUB):
        return load_hub(source)
    if "://" in source:
        raise DataError(f"data {source!r}: real images are read from local files only; copy them here first")
    path = Path(source)
    if not path.exists():
        known = [*EMBEDDED_DATA, *DATASETS]
        raise DataError(
            f"data {source!r}: no such file or folder, nor one of {', '.join(known)}; {did_you_mean(path.name, known)}"
            "give a Parquet file or folder, a folder of class folders, or hf://datasets/OWNER/NAME"
        )
    if path.is_file() or any(path.rglob("*.parquet")):
        return load_parquet(path)
    return load_folder(path)
