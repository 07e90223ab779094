import threading
from pathlib import Path

import pytest

from lr_ray.config import ExperimentConfig
from lr_ray.errors import StorageError
from lr_ray.report.progress import Reporter
from lr_ray.report.write import watch_synthetic
from lr_ray.storage.synthetic import synthetic_name, write_synthetic
from tests.storage.test_synthetic import draw, spec_of


class Listening(Reporter):
    """Ends the watching when it has heard enough."""

    def __init__(self, over: threading.Event, root: Path) -> None:
        super().__init__()
        self.said: list[str] = []
        self.sheets: list[bytes] = []
        self._over, self._root = over, root

    def say(self, message: str) -> None:
        self.said.append(message)
        if "latest" not in message:
            return
        self.sheets.append((self._root / "contact_sheet.png").read_bytes())
        if len(self.sheets) == 1:
            add(self._root, "adapter-0", seed=1)
        elif len(self.sheets) == 2:
            self._over.set()


def add(root: Path, adapter_id: str, *, seed: int) -> None:
    spec = spec_of(adapter_id, ("lion", "lynx"))
    write_synthetic(
        str(root / "synthetic" / synthetic_name(adapter_id, "0123456789ab")),
        draw(2, 2, seed=seed),
        spec,
        seed=seed,
        identity={},
    )


def test_the_sheet_is_drawn_again_when_images_come(tmp_path: Path):
    over = threading.Event()
    reporter = Listening(over, tmp_path)
    add(tmp_path, "adapter-1", seed=0)

    watch_synthetic(ExperimentConfig(name="watched", output=str(tmp_path)), reporter, over)

    assert reporter.said[0] == f"watching {tmp_path}/synthetic; Ctrl-C ends it"
    assert [line.partition(".png: ")[2] for line in reporter.said[1:]] == [
        "1 adapters in 1 files, the latest adapter-1",
        "2 adapters in 2 files, the latest adapter-0",
    ]
    first, second = reporter.sheets
    assert first.startswith(b"\x89PNG")
    assert second.startswith(b"\x89PNG")
    assert first != second


def test_images_that_are_damaged_end_the_watching(tmp_path: Path):
    folder = tmp_path / "synthetic"
    folder.mkdir()
    (folder / "adapter-0123456789ab.parquet").write_bytes(b"damaged")
    with pytest.raises(StorageError, match="run `lr-ray invert` again"):
        watch_synthetic(ExperimentConfig(name="watched", output=str(tmp_path)), Reporter(quiet=True), threading.Event())
