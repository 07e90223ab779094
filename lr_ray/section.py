"""The base of every section of a config, and what several sections have in common."""

import fnmatch
from collections.abc import Sequence
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """One section of a config, owned by the module that reads it. Immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """`true`, which is 1 to Python, only where it means true."""
        if isinstance(value, bool) and not _has_bool(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("true or false is not allowed here")
        return value


def _has_bool(annotation: Any) -> bool:
    return annotation is bool or any(_has_bool(inner) for inner in get_args(annotation))


def _split(value: object) -> object:
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(str(part) for part in parts) if isinstance(parts, list) else parts


ClassPatterns = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""Class names, patterns (`latin/*`) or ranges of positions (`0:30`); a string is split at its commas."""


def match_classes(class_names: Sequence[str], pattern: str) -> set[int]:
    """Positions of the classes that a name, pattern or range means; empty if there are none."""
    if pattern in class_names:
        return {class_names.index(pattern)}
    start, colon, stop = pattern.partition(":")
    if colon and all(part.isdecimal() for part in (start, stop) if part):
        return set(range(len(class_names))[int(start or 0) : int(stop) if stop else None])
    return {i for i, name in enumerate(class_names) if fnmatch.fnmatchcase(name, pattern)}
