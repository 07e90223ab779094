"""`lr-ray classify --output`: a batch job over a prefix of images; Ray Data's actors each commit pieces of the answers."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lr_ray.config import RayConfig
from lr_ray.data.folder import check_names, is_image
from lr_ray.errors import AdapterError, DataError, LrRayError, RequestError, StorageError
from lr_ray.model import Model, load_parts
from lr_ray.report.progress import Reporter
from lr_ray.runtime.board import start_board
from lr_ray.runtime.session import actor_pool, check_shared, fields_of, ray_session, user_error, worker_device
from lr_ray.serving.images import Upload, check_bytes, decode_uploads
from lr_ray.serving.limits import Limits
from lr_ray.serving.local import answer_row, embed_support, read_support
from lr_ray.serving.tasks import Support
from lr_ray.storage.classified import count_errors, write_classified
from lr_ray.storage.filesystem import absolute_path, exists, file_size, join, list_marks, list_uris, read_if_there, read_many
from lr_ray.storage.manifest import claim_folder, digest_of

ROWS = "rows"
"""Below the output: the folder that holds the answers and nothing else."""
FILES_PER_PIECE = 500
_LEAST_THREADS = 4
"""That read and decode beside an actor's passes: files of an object store are waited for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationJob:
    """What all pieces have in common.

    Attributes:
        meta_lora: folder or URI.
        model: its digest, by `Parts.digest`.
        support: the classes, embedded.
        temperature: see `Support.classify`.
        reject: whether what is none of these has no class.
        query: folder or URI of the images.
    """

    meta_lora: str
    model: str
    support: Support
    temperature: float
    reject: bool
    query: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some of the images, and where their answers go.

    Attributes:
        uri: derived from all that determines the answers.
        names: of the files, relative to the query folder.
        sizes: of those, in bytes.
    """

    uri: str
    names: Sequence[str]
    sizes: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationReport:
    """What came of it.

    Attributes:
        output: folder or URI of the Parquet files.
        files: how many they are.
        rows: one an image.
        errors: how many of them have one.
    """

    output: str
    files: int
    rows: int
    errors: int


class ClassificationActor:
    """Holds the backbone; classifies one piece at a time and commits its rows."""

    def __init__(self, job: ClassificationJob, config: RayConfig, board: Any) -> None:
        self._job, self._board, self._max_failures = job, board, config.max_failures
        self._device = worker_device(config)
        self._num_threads = max(_LEAST_THREADS, config.cpus_per_actor)
        self._limits = Limits()

    @cached_property
    def _model(self) -> Model:
        """Loaded with the first piece: an error of a constructor would be tracebacks of Ray's, and no line."""
        parts = load_parts(self._job.meta_lora, self._device)
        if parts.digest() != self._job.model:
            raise AdapterError(f"meta-LoRA {self._job.meta_lora} changed, or is another one on another machine; run again")
        return parts.merged()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One row of `Piece` fields → num_rows, num_errors, error; one row."""
        piece = Piece(**fields_of(batch))
        try:
            num_errors, error = self.commit(piece), ""
        except LrRayError as failure:
            num_errors, error = 0, str(failure)
        return {"num_rows": [len(piece.names)], "num_errors": [num_errors], "error": [error]}

    def commit(self, piece: Piece) -> int:
        """How many rows of the piece's file have an error; the file is made if it is not there.

        Raises:
            LrRayError: it cannot be made.
        """
        if exists(piece.uri):
            return count_errors(piece.uri)
        self._begin(piece)
        rows = self._rows(piece)
        write_classified(piece.uri, rows)
        return sum("error" in row for row in rows)

    def _begin(self, piece: Piece) -> None:
        """Raise if the images are not here, or the piece cost too many workers: Ray Data would try it again for ever."""
        import ray

        if "://" not in self._job.query and not os.path.isdir(self._job.query):
            raise StorageError(
                f"--query {self._job.query} is not on node {ray.util.get_node_ip_address()}; give what all nodes see"
            )
        if ray.get(self._board.begin.remote(piece.uri, "")) > self._max_failures + 1:
            raise StorageError(
                f"{piece.uri}: its worker was lost {self._max_failures + 1} times; memory ran out, or an image between "
                f"{piece.names[0]!r} and {piece.names[-1]!r} ends the decoder: remove that, or give the machine more memory"
            )

    def _rows(self, piece: Piece) -> list[dict[str, Any]]:
        """Images are read and decoded while those before them are classified."""
        rows: list[dict[str, Any]] = []
        batch_size = self._model.batch_size
        with ThreadPoolExecutor(self._num_threads) as pool:
            decoded = zip(piece.names, pool.map(self._decode, piece.names, piece.sizes), strict=True)
            while part := list(islice(decoded, batch_size)):
                rows += self._answer(part)
        return rows

    def _decode(self, name: str, num_bytes: int) -> Tensor | str:
        """(3, image_px, image_px) uint8, or why there are no pixels."""
        try:
            check_bytes(name, num_bytes, self._limits)
            content = read_if_there(join(self._job.query, name))
            if content is None:
                return "it was there when the folder was listed, and is not any more"
            return decode_uploads([Upload(name=name, content=content)], self._model.backbone.image_px, self._limits)[0]
        except RequestError as error:
            return str(error)

    def _answer(self, part: Sequence[tuple[str, Tensor | str]]) -> list[dict[str, Any]]:
        """A row each of (name, pixels or error)."""
        pixels = [found for _, found in part if isinstance(found, Tensor)]
        features = self._model.embed(torch.stack(pixels)) if pixels else None
        answers = iter(() if features is None else self._job.support.classify(features, temperature=self._job.temperature))
        return [
            {"file": name, "error": found}
            if isinstance(found, str)
            else answer_row(name, next(answers), reject=self._job.reject)
            for name, found in part
        ]


def classify_prefix(
    meta_lora: str,
    support: str,
    query: str,
    output: str,
    reporter: Reporter,
    *,
    temperature: float = 1.0,
    reject: bool = False,
    files_per_piece: int = FILES_PER_PIECE,
) -> ClassificationReport:
    """Classify every image below a folder or URI into Parquet files below another; what is there already is kept.

    A row an image: `file` (its name below the folder), `class` (null for none of these with `reject`), `probability`,
    `distance`, `none_of_these` (null without a threshold), and for an image that does not decode or is beyond
    `lr_ray.serving.limits.Limits` only `error`.

    Args:
        meta_lora: folder or URI of a meta-LoRA.
        support: folder or URI of class folders of images.
        query: folder or URI, read in any depth.
        output: folder or URI; the Parquet files go to its `rows`.
        temperature: see `Support.classify`.
        files_per_piece: images of a Parquet file, at most.

    Raises:
        DataError: no images, support of one class or damaged, with `reject` no threshold; before Ray starts.
        StorageError: not readable or writable, or the output is another job's; what was finished is kept.
        Besides as `lr_ray.load`.
    """
    meta_lora, support, query, output = (absolute_path(path) for path in (meta_lora, support, query, output))
    parts, labelled = load_parts(meta_lora), read_support(support)
    model = parts.digest()
    task = embed_support(parts.merged(), labelled, reject=reject)
    job = ClassificationJob(meta_lora=meta_lora, model=model, support=task, temperature=temperature, reject=reject, query=query)
    settings = {"temperature": temperature, "reject": reject}
    shared = {"step": "classify", "model": model, "support": labelled.digest(), **settings}
    marks, rows = _list_images(query), join(output, ROWS)
    pieces = _pieces(marks, shared, rows, files_per_piece)
    size = {"files": len(marks), "bytes": sum(num_bytes for num_bytes, _ in marks.values())}
    listed = size | {"digest": digest_of([piece.uri.rsplit("/", 1)[-1] for piece in pieces])}
    given = {"meta_lora": meta_lora, "support": support, "query": query}
    claim_folder(output, shared | {"files_per_piece": files_per_piece, "query": listed}, config=given | settings)
    there = list_uris(rows, suffix=".parquet")
    done, todo = [piece for piece in pieces if piece.uri in there], [piece for piece in pieces if piece.uri not in there]
    kept = sum(len(piece.names) for piece in done)
    reporter.say(f"classify: {len(marks)} images by {len(task.class_names)} classes into {output}, {kept} done already")
    errors = sum(read_many(lambda piece: count_errors(piece.uri), done))
    if todo:
        with ray_session(_ray_config()):
            errors += _classify_all(todo, job, reporter)
        check_shared([piece.uri for piece in todo], list_uris(rows, suffix=".parquet"), output=output)
    return ClassificationReport(output=rows, files=len(pieces), rows=len(marks), errors=errors)


def _list_images(query: str) -> dict[str, tuple[int, str]]:
    """`list_marks` of the images."""
    if file_size(query) is not None:
        raise DataError(f"--query {query} is a file; a batch job takes a folder or a URI of images; leave --output out for one")
    marks = {name: mark for name, mark in list_marks(query).items() if is_image(name)}
    if not marks:
        raise DataError(f"--query {query}: no images below it; give a folder of images, or a URI such as s3://bucket/images")
    check_names(f"--query {query}", marks)
    return marks


def _pieces(marks: dict[str, tuple[int, str]], shared: dict[str, Any], folder: str, files_per_piece: int) -> list[Piece]:
    """In the order of the files' names."""
    names, pieces = list(marks), []
    for number, start in enumerate(range(0, len(names), files_per_piece)):
        members = names[start : start + files_per_piece]
        digest = digest_of({**shared, "files": [[name, *marks[name]] for name in members]})
        uri = join(folder, f"part-{number:06d}-{digest[:12]}.parquet")
        pieces.append(Piece(uri=uri, names=members, sizes=[marks[name][0] for name in members]))
    return pieces


def _ray_config() -> RayConfig:
    """The Ray of RAY_ADDRESS, as Ray's own commands and jobs have it, or else one of this machine."""
    return RayConfig(address=os.environ.get("RAY_ADDRESS") or "local", dashboard=False)


def _share_of(nodes: Sequence[dict[str, Any]], config: RayConfig) -> RayConfig:
    """What an actor takes: where nodes have GPUs, one and its part of the node's processors; else a processor."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    found = [resources for resources in alive if min(resources.get("GPU", 0), resources.get("CPU", 0)) >= 1]
    if not found:
        return config
    cpus = min(int(resources.get("CPU", 0) // resources["GPU"]) for resources in found)
    return config.model_copy(update={"num_gpus_per_actor": 1.0, "cpus_per_actor": max(1, cpus)})


def _classify_all(todo: Sequence[Piece], job: ClassificationJob, reporter: Reporter) -> int:
    """Show the pieces as they come; returns how many rows have an error."""
    import ray

    config = _share_of(ray.nodes(), _ray_config())
    start, num_rows, num_errors = time.monotonic(), 0, 0
    with reporter.track("classify", len(todo)) as advance:
        try:
            for row in actor_pool(todo, config, ClassificationActor, job, config, start_board()).iter_rows():
                if row["error"]:
                    raise StorageError(f"{row['error']}; what was finished is kept")
                num_rows, num_errors = num_rows + row["num_rows"], num_errors + row["num_errors"]
                per_s = num_rows / (time.monotonic() - start)
                advance(f"{num_rows} images, {num_errors} without an answer; {per_s:.0f} images/s")
        except ray.exceptions.RayError as error:
            raise user_error(error) from error
    return num_errors
