"""The small formats of an adapter's files, held to what every later reader takes: JSON, front matter, safetensors headers.

Nothing that is read here decides what runs, and no length that a file claims is believed before it is held against the file.
"""

import json
import math
import re
from collections import Counter
from typing import Any, TypeGuard

import yaml

from lr_ray.errors import AdapterError
from lr_ray.library.files import say

MAX_WEIGHTS_BYTES = 2 * 2**30
"""Of one safetensors file: rank 256 on every layer of the largest ViT in float32 is half of it; it is held in memory."""
MAX_DEPTH = 100
"""Of nested JSON. The parser takes ten times that, but not all that later walks through the values does."""

_MAX_CARD_BYTES = 2**16
"""Of the front matter of a model card: YAML is parsed at some 100 kB/s."""
_MAX_HEADER_BYTES = 100_000_000
"""Of the header of a safetensors file; the limit of the safetensors library itself."""
_MAX_DIMS = 8
_MAX_NAME = 300
"""Characters of a tensor's name; the longest that peft writes for these models have some 120."""
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


def json_object(content: bytes, what: str) -> dict[str, Any]:
    """A JSON object; AdapterError, which says what the content is of, where it is none that every later reader takes."""
    try:
        return _parse_object(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{what}: no JSON object that can be read ({say(error)}); allowed: UTF-8, finite numbers, at most {MAX_DEPTH} "
            "levels; get it again from its source"
        ) from error


def _parse_object(content: bytes) -> dict[str, Any]:
    """A JSON object that every later reader takes, and alike: UTF-8, numbers finite, no name twice, not nested too deeply.

    Raises:
        ValueError, RecursionError: it is anything else.
    """
    text = content.decode("utf-8-sig")
    value = json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole, object_pairs_hook=_without_twins)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}")
    _check_values(value)
    return value


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal[:20]} is no finite number")
    return value


def _whole(literal: str) -> int:
    if literal == "-0":  # to the parser of safetensors a float
        raise ValueError("-0 is no integer")
    return int(literal)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two entries of one name counts."""
    value = dict(pairs)
    if len(value) != len(pairs):
        (twin, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twin!r:.80} stands in it twice")
    return value


def _check_values(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                item.encode()  # half a surrogate pair is a str, but no text that could be written
        if not below:
            return
        level = below
    raise ValueError("nested too deeply")


class _CardLoader(yaml.SafeLoader):
    """Without aliases, of which nine can stand for a billion values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def front_matter(content: bytes, what: str) -> dict[str, Any]:
    """The YAML between the `---` lines that a model card starts with; none if it starts with other text.

    Raises:
        AdapterError: no UTF-8, or no YAML mapping between them.
    """
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
        found = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
        if found is None:
            return {}
        if len(found[1]) > _MAX_CARD_BYTES:
            raise ValueError(f"more than {_MAX_CARD_BYTES:,} characters")
        card = yaml.load(found[1], _CardLoader)
        if not isinstance(card, dict | None):
            raise ValueError(f"it holds a {type(card).__name__}")
        _check_values(card)
        return {str(key): value for key, value in (card or {}).items()}
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise AdapterError(f"{what}: its front matter is no YAML mapping ({say(error)}); correct or remove it") from error


def class_names_of(id2label: Any, what: str) -> tuple[str, ...]:
    """Of {"0": "cat", "1": "dog"}, as Transformers writes it, or ["cat", "dog"]; AdapterError for anything else."""
    if not id2label:
        return ()
    if isinstance(id2label, list):
        id2label = {str(index): name for index, name in enumerate(id2label)}
    keys = [str(index) for index in range(len(id2label))] if isinstance(id2label, dict) else []
    if not keys or set(id2label) != set(keys) or not all(isinstance(name, str) for name in id2label.values()):
        raise AdapterError(f"{what} does not number its class names 0, 1, 2, … ({id2label!r:.60}); correct or remove it")
    return tuple(id2label[key] for key in keys)


def check_safetensors(content: bytes, what: str) -> dict[str, str]:
    """The metadata of a safetensors file, once every tensor is known to lie in it: none larger than it says, none overlapping.

    Raises:
        AdapterError: damaged, or not of that format.
    """
    try:
        size = int.from_bytes(content[:8], "little")
        if len(content) < 8 or size > min(len(content) - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"a header of {size:,} bytes in a file of {len(content):,}")
        if content[8:9] != b"{":
            raise ValueError("its header does not start with {")
        header = _parse_object(content[8 : 8 + size])
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ is not text by name")
        end = 0
        extents = [_extent(name, entry) for name, entry in header.items()]
        for name, begin, stop in sorted(extents, key=lambda extent: extent[1:]):
            if begin != end:
                raise ValueError(f"tensor {name!r:.80} starts at byte {begin:,} in place of {end:,}")
            end = stop
        if 8 + size + end != len(content):
            raise ValueError(f"tensors of {end:,} bytes in all, but {len(content) - 8 - size:,} follow the header")
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what}: no whole safetensors file ({str(error)[:300]}); get it again from its source") from error
    return metadata


def _extent(name: str, entry: Any) -> tuple[str, int, int]:
    """Where a tensor says to begin and end; ValueError where its type and shape do not fill that."""
    if len(name) > _MAX_NAME:
        raise ValueError(f"a tensor's name of {len(name):,} characters, but at most {_MAX_NAME} are read")
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {name!r:.80} is a {type(entry).__name__}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"tensor {name!r:.80} has dtype {dtype!r:.40}, not one of {', '.join(_ITEM_BYTES)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS or math.prod(size or 1 for size in shape) > MAX_WEIGHTS_BYTES:
        raise ValueError(f"tensor {name!r:.80} has shape {shape!r:.80}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"tensor {name!r:.80} of {dtype} {shape} has the offsets {offsets!r:.80}")
    return name, offsets[0], offsets[1]


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
