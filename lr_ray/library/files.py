"""What every kind of source becomes: names with their sizes, and a way to read one of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from lr_ray.errors import AdapterError
from lr_ray.storage.manifest import CARD_NAME, CONFIG_NAME, MANIFEST_NAME

MAX_CONFIG_BYTES = 1 * 2**20
"""Of one JSON file, model card or list: an `id2label` of 10,000 classes is a third of it."""
MAX_FILES = 50_000
"""In one folder, archive or repository: ten thousand adapters of five files."""

PREPROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"
"""Of transformers 5, which has the same as a section `image_processor`."""
MODEL_CONFIG_NAME = "config.json"
BESIDE = (CONFIG_NAME, PREPROCESSOR_NAME, PROCESSOR_NAME, MANIFEST_NAME, MODEL_CONFIG_NAME, CARD_NAME)
"""What is read of an adapter besides its weights."""
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONVERT = (
    "only safetensors are read, since a pickle can run any code: convert it yourself, "
    "`safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'adapter_model.safetensors')`"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Files by name, wherever they are."""

    source: str
    separator: str
    """Between the source and a name in what an adapter is called."""
    sizes: dict[str, int]
    """Name, with `/` between folders → bytes. In the order in which they are best read."""
    read: Callable[[str], bytes]
    """The content of the file of that name; AdapterError or StorageError where it cannot be had."""
    open: Callable[[str], BinaryIO] | None = None
    """The file of that name, to be read at any place and closed, likewise. None within an archive."""

    def label(self, name: str) -> str:
        """What to call a file or folder in it; itself for the empty name."""
        shown = name if name.isprintable() else ascii(name)
        return f"{self.source}{self.separator}{shown}" if name else self.source


def say(error: BaseException) -> str:
    """Kind and message, short enough for one line."""
    return f"{type(error).__name__}: {error}"[:200]


def check_size(what: str, size: int, limit: int) -> None:
    """AdapterError if it is larger than the limit."""
    if size > limit:
        raise AdapterError(f"{what}: {size:,} bytes, but at most {limit:,} are read; leave it out or make it smaller")
