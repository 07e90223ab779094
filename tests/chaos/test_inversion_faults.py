"""The short form of `bench/chaos.py`: one process of each kind that matters is killed, and nothing is lost."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.chaos import FAULTS, Bed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the bed and two attempts, each with a Ray of its own, beside others


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize(("fault", "survives"), [("driver", False), ("node", True)])
def test_every_row_is_there_once_and_as_if_nothing_had_happened(bed: Bed, tmp_path: Path, fault: str, survives: bool) -> None:
    outcome = FAULTS[fault](bed, tmp_path / "synthetic", random.Random(1))

    assert outcome.hit
    assert outcome.survived == survives
    assert (outcome.lost, outcome.doubled, outcome.changed) == (0, 0, 0)


def test_the_bed_tells_rows_that_are_lost_doubled_and_changed(bed: Bed, tmp_path: Path) -> None:
    folder = tmp_path / "synthetic"
    folder.mkdir()
    first, second, *others = sorted(bed.expected)
    for name in (first, *others):
        (folder / name).write_bytes(bed.expected[name])
    (folder / "again.parquet").write_bytes(bed.expected[first])

    outcome = bed.compare("none", folder, hit=False, survived=True, attempts=1, begun=0)

    sizes = {name: pq.read_metadata(pa.BufferReader(bed.expected[name])).num_rows for name in (first, second)}
    assert (outcome.lost, outcome.doubled, outcome.changed) == (sizes[second], sizes[first], 2)
