"""What an evaluation keeps: the episodes, features of the test images, and what each method predicted."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lr_ray.errors import StorageError
from lr_ray.fewshot.protocol import DrawnEpisode
from lr_ray.storage.filesystem import read_bytes, read_if_there, write_bytes
from lr_ray.storage.parquet import write_parquet

_FACTS_KEY = b"lr_ray"
_OF_A_ROW = {"accuracy", "dataset", "method"}


def file_name(label: str, digest: str, suffix: str) -> str:
    """Of something that is called so and was made from inputs of that digest."""
    return f"{re.sub('[^a-zA-Z0-9.]+', '-', label).strip('-')}-{digest[:12]}{suffix}"


def read_rows(uri: str) -> list[dict[str, Any]] | None:
    """What `results.json` holds; None where it is not.

    Raises:
        StorageError: it is damaged, or cannot be read.
    """
    content = read_if_there(uri)
    if content is None:
        return None
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"results {uri} are damaged ({error}); delete that file and run again") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _OF_A_ROW for row in rows):
        raise StorageError(
            f"results {uri} are no list of rows with {', '.join(sorted(_OF_A_ROW))}; delete that file and run again"
        )
    return rows


def write_episodes(
    uri: str,
    episodes: Sequence[DrawnEpisode],
    labels: np.ndarray,
    class_names: Sequence[str],
    describe: Callable[[int], str],
) -> None:
    """Commit test episodes for other programs: Parquet, a row an image of an episode, way by way, support before queries.

    Columns: `episode`, `way` (in [0, N)), `class_name`, `role` (support or query), `image` (its position in the data),
    `source` (its file, or row of a file).

    Args:
        labels: (M,) class of each image.
        describe: position of an image → where it came from.
    """
    images = np.concatenate([episode.images for episode in episodes])
    numbers = np.arange(len(episodes)).repeat([len(episode.images) for episode in episodes])
    is_query = np.concatenate([episode.is_query for episode in episodes])
    names = np.array(class_names)[labels[images]]
    sources = {int(image): describe(int(image)) for image in np.unique(images)}
    table = pa.table(
        {
            "episode": numbers.astype(np.int32),
            "way": np.concatenate([episode.ways for episode in episodes]).astype(np.int32),
            "class_name": pa.array(names.astype(object), pa.string()),
            "role": pa.array(np.where(is_query, "query", "support").astype(object), pa.string()),
            "image": images,
            "source": [sources[int(image)] for image in images],
        }
    )
    write_parquet(uri, table)


def write_predictions(uri: str, predicted: Sequence[np.ndarray], seconds: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Commit what a method predicted of some episodes: a row an episode.

    Args:
        predicted: of each of E episodes, (N, Q) ways in [0, N).
        seconds: (E,) that each took.
        facts: of all of them, as JSON.
    """
    flat = [ways.ravel().astype(np.int16) for ways in predicted]
    table = pa.table({"predicted": pa.array(flat, pa.list_(pa.int16())), "seconds": seconds.astype(np.float64)})
    write_parquet(uri, table.replace_schema_metadata({_FACTS_KEY: json.dumps(dict(facts))}))


def read_predictions(uri: str, sizes: Sequence[tuple[int, int]]) -> tuple[list[np.ndarray], np.ndarray, dict[str, Any]]:
    """Of each episode the (N, Q) predicted ways, the (E,) seconds and the facts.

    Args:
        sizes: of each episode, its ways and the queries of each.

    Raises:
        StorageError: unreadable, or not of episodes of these sizes.
    """
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(uri)), columns=["predicted", "seconds"])
        facts = json.loads(table.schema.metadata[_FACTS_KEY])
        flat = table["predicted"].to_numpy()
        predicted = [ways.reshape(size) for ways, size in zip(flat, sizes, strict=True)]
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise StorageError(f"predictions {uri}: damaged ({error}); delete the file and run again") from error
    return predicted, table["seconds"].to_numpy(), facts


def write_tensors(uri: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Commit tensors and facts, as JSON, as one safetensors file."""
    write_bytes(uri, save_safetensors(dict(tensors), metadata={_FACTS_KEY.decode(): json.dumps(dict(facts))}))


def read_tensors(uri: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        StorageError: unreadable or damaged.
    """
    content = read_bytes(uri)
    try:
        tensors: dict[str, Tensor] = load_safetensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts: dict[str, Any] = json.loads(header["__metadata__"][_FACTS_KEY.decode()])
    except (SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{uri}: damaged ({error}); delete the file and run again") from error
    return tensors, facts
