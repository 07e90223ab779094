"""What an evaluation keeps is what was given, and what is damaged is named."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lr_ray.errors import StorageError
from lr_ray.fewshot.protocol import DrawnEpisode, layout_of
from lr_ray.storage.measurements import (
    file_name,
    read_predictions,
    read_rows,
    read_tensors,
    write_episodes,
    write_predictions,
    write_tensors,
)


def test_rows_there_not_there_and_damaged(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert read_rows(str(path)) is None
    path.write_text('[{"method": "nn", "dataset": "cub", "accuracy": 50.5}]')
    assert read_rows(str(path)) == [{"method": "nn", "dataset": "cub", "accuracy": 50.5}]
    for damaged in ("", '[{"method": "nn", "accuracy": 50.5}]', '[{"method": "nn"', "[" * 100_000, '{"method": "nn"}', "[1]"):
        path.write_text(damaged)
        with pytest.raises(StorageError, match=r"results\.json are .*delete that file and run again$"):
            read_rows(str(path))


def test_a_name_is_one_for_any_file_system() -> None:
    name = file_name("bpa:features=loras-avg:2.5,x/y", "0123456789abcdef", ".parquet")
    assert name == "bpa-features-loras-avg-2.5-x-y-0123456789ab.parquet"


def test_predictions(tmp_path: Path) -> None:
    uri, predicted = str(tmp_path / "p.parquet"), np.array([[[0, 1], [1, 1]], [[1, 0], [0, 1]], [[0, 0], [1, 0]]])
    write_predictions(uri, predicted, np.array([0.5, 1.0, 2.0]), {"trained_parameters": 7})
    found, seconds, facts = read_predictions(uri, [(2, 2)] * 3)
    assert np.array_equal(found, predicted)
    assert seconds.tolist() == [0.5, 1.0, 2.0]
    assert facts == {"trained_parameters": 7}


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"no parquet at all"])
def test_damaged_predictions(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "p.parquet"
    path.write_bytes(damage)
    with pytest.raises(StorageError, match=r"predictions .*p.parquet: damaged .*; delete the file and run again"):
        read_predictions(str(path), [(2, 2)])


def test_predictions_of_episodes_that_differ(tmp_path: Path) -> None:
    uri, predicted = str(tmp_path / "p.parquet"), [np.array([[0, 1]] * 2), np.array([[2], [1], [0]])]
    write_predictions(uri, predicted, np.ones(2), {})
    found, _, _ = read_predictions(uri, [(2, 2), (3, 1)])
    assert [ways.tolist() for ways in found] == [ways.tolist() for ways in predicted]


@pytest.mark.parametrize("sizes", [[(3, 2)], [], [(2, 2)] * 2], ids=["ways", "none", "too many"])
def test_predictions_of_other_episodes(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    uri = str(tmp_path / "p.parquet")
    write_predictions(uri, np.zeros((1, 2, 2)), np.ones(1), {})
    with pytest.raises(StorageError, match="damaged"):
        read_predictions(uri, sizes)


def test_tensors_and_their_facts(tmp_path: Path) -> None:
    uri = str(tmp_path / "t.safetensors")
    write_tensors(uri, {"features": torch.arange(6.0).view(2, 3)}, {"seconds": 1.5})
    tensors, facts = read_tensors(uri)
    assert torch.equal(tensors["features"], torch.arange(6.0).view(2, 3))
    assert facts == {"seconds": 1.5}
    Path(uri).write_bytes(Path(uri).read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"t.safetensors: damaged .*; delete the file and run again"):
        read_tensors(uri)


def test_episodes_name_every_image_for_other_programs(tmp_path: Path) -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    images = np.array([[0, 1, 2, 3, 4, 5], [5, 3, 4, 1, 0, 2]])
    ways, is_query = layout_of(np.array([1, 1]), 2)
    episodes = [DrawnEpisode(images=found, ways=ways, is_query=is_query) for found in images]
    uri = str(tmp_path / "e.parquet")
    write_episodes(uri, episodes, labels, ("cat", "dog"), lambda image: f"{image}.png")
    rows = pq.read_table(uri).to_pylist()
    assert len(rows) == 12
    assert rows[0] == {"episode": 0, "way": 0, "class_name": "cat", "role": "support", "image": 0, "source": "0.png"}
    assert rows[4] == {"episode": 0, "way": 1, "class_name": "dog", "role": "query", "image": 4, "source": "4.png"}
    assert rows[6] == {"episode": 1, "way": 0, "class_name": "dog", "role": "support", "image": 5, "source": "5.png"}
    assert [row["image"] for row in rows] == images.ravel().tolist()
