"""The literature's class splits, as data files with their source."""

import functools
import json
from collections.abc import Collection
from importlib import resources
from typing import Any

_NOTES = ("paper", "source")


@functools.cache
def _content(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (resources.files("lr_ray.data") / "splits" / f"{name}.json").read_text(encoding="utf-8")
    )
    return content


def class_lists(name: str) -> dict[str, list[str]]:
    """Split → its classes: names, or what stands in a name before a dot (a number) or slash (an alphabet)."""
    return {split: classes for split, classes in _content(name).items() if split not in _NOTES}


def source_of(name: str) -> tuple[str, str]:
    """The paper that made the split, and the address of the list."""
    content = _content(name)
    return content["paper"], content["source"]


def entry_of(class_name: str, entries: Collection[str]) -> str | None:
    """The entry of a list that `class_name` belongs to."""
    keys = (class_name, class_name.partition(".")[0], class_name.partition("/")[0])
    return next((key for key in keys if key in entries), None)
