"""From a `DataConfig` to images."""

from pathlib import Path

from lr_ray.data.digits import load_digits
from lr_ray.data.folder import load_folder
from lr_ray.data.glyphs import load_glyphs
from lr_ray.data.images import DataConfig, LabelledImages
from lr_ray.data.parquet import load_parquet
from lr_ray.errors import DataError

EMBEDDED_DATA = {"glyphs": load_glyphs, "digits": load_digits}


def load_data(config: DataConfig) -> LabelledImages:
    """The images of `config.source`, its classes selected.

    Raises:
        DataError: no such data, not readable as images, or no such class.
    """
    if config.source in EMBEDDED_DATA:
        return EMBEDDED_DATA[config.source]().select(config.classes)
    if "://" in config.source:
        raise DataError(f"data {config.source!r}: real images are read from local files only; copy them here first")
    path = Path(config.source)
    if not path.exists():
        raise DataError(
            f"data {config.source!r}: no such file or folder, nor one of {', '.join(EMBEDDED_DATA)}; "
            "give a Parquet file or folder, or a folder of class folders"
        )
    if path.is_file() or any(path.rglob("*.parquet")):
        return load_parquet(path).select(config.classes)
    return load_folder(path).select(config.classes)
