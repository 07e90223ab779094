"""`digits`: scikit-learn's 1,797 scans of handwritten digits, 8 × 8 pixels."""

import hashlib

import numpy as np
from PIL import Image

from lr_ray.data.images import LabelledImages


def load_digits() -> LabelledImages:
    """Ten classes `0` to `9`, white on black."""
    from sklearn.datasets import load_digits as load_scans  # a second to import, which no worker should pay for nothing

    scans = load_scans()
    images, labels = (scans.images * (255 / 16)).round().astype(np.uint8), scans.target.astype(np.int64)
    return LabelledImages(
        name="digits",
        class_names=tuple("0123456789"),
        labels=labels,
        describe=lambda index: f"digits[{index}]",
        open_image=lambda index: Image.fromarray(images[index]),
        digest=lambda: hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
    )
