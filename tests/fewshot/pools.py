"""A pool of images as the classes that a stream draws from."""

import numpy as np
import torch

from lr_ray.fewshot.episodes import ClassImages, ClassRef, ImagePool


def classes_of(pool: ImagePool, *, synthetic: bool = True) -> list[ClassImages]:
    """Real ones have no teacher and no patch order."""
    classes = []
    for c, name in enumerate(pool.class_names):
        members = torch.from_numpy(np.flatnonzero(pool.class_of == c))
        known = {}
        if synthetic:
            known = {name: getattr(pool, name)[members] for name in ("teacher_logits", "flipped_logits", "patch_order")}
        adapter, slot = str(pool.adapter_of[c]), int(pool.slot_of[c])
        classes.append(ClassImages(name=name, adapter=adapter, slot=slot, images=pool.images[members], **known))
    return classes


def refs_of(pool: ImagePool) -> tuple[ClassRef, ...]:
    """One file an adapter."""
    return tuple(
        ClassRef(
            file=f"{pool.adapter_of[c]}.parquet",
            row_group=c,
            adapter=str(pool.adapter_of[c]),
            slot=int(pool.slot_of[c]),
            name=name,
            num_images=int((pool.class_of == c).sum()),
        )
        for c, name in enumerate(pool.class_names)
    )
