"""What a request may bring, and what an owner may keep."""

import re
from dataclasses import dataclass

MIB = 2**20
OWNER = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
"""The name of a key, whose tasks lie below it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request may bring.

    Attributes:
        body_bytes: of the whole body, as it comes and, of a zip, unpacked.
        body_s: in which all of the body is to come.
        image_bytes: of one encoded image.
        image_pixels: of one image.
        pixels: of all images together.
        images: their count.
        classes: of a task.
        name_length: of a class name, in characters.
    """

    body_bytes: int = 32 * MIB
    body_s: float = 60.0
    image_bytes: int = 10 * MIB
    image_pixels: int = 25_000_000
    pixels: int = 400_000_000
    images: int = 500
    classes: int = 1000
    name_length: int = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What an owner's tasks may take.

    Attributes:
        tasks: their count.
        bytes: of all of them, as stored.
        age_s: after which a task is gone, from its creation.
    """

    tasks: int = 100
    bytes: int = 256 * MIB
    age_s: float = 30 * 86400.0
