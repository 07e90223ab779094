"""What the service answers, as JSON and in its OpenAPI document."""

from collections.abc import Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:  # the client has these answers without torch
    from torch import Tensor

    from lr_ray.serving.limits import Bounds
    from lr_ray.serving.models import Catalogue
    from lr_ray.serving.tasks import Prediction, Task


class Problem(BaseModel):
    """An error, by RFC 9457."""

    type: str = "about:blank"
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["there is no such task"])
    request_id: str = Field(description="As in the header X-Request-ID.")

    @classmethod
    def of(cls, status: int, detail: str, request_id: str) -> "Problem":
        """With the status's own title."""
        return cls(title=HTTPStatus(status).phrase, status=status, detail=detail, request_id=request_id)


class ClassAnswer(BaseModel):
    """A class of a task."""

    name: str
    images: int = Field(description="How many support images it has.")
    prototype: list[float] | None = Field(default=None, description="With ?prototypes=true.")


class TaskAnswer(BaseModel):
    """A task."""

    id: str
    model: str = Field(description="Name of the model that it was made with, and is used with.")
    version: int = Field(description="Changes with every change; also the ETag.")
    created: datetime
    expires: datetime
    threshold: float | None = Field(
        description="A query farther from every prototype is none of these; null at one image a class."
    )
    classes: list[ClassAnswer]

    @classmethod
    def of(cls, task: "Task", bounds: "Bounds", *, model: str, prototypes: bool = False) -> "TaskAnswer":
        """What is to be told of a task."""
        created_s = int(task.task_id[:8], 16)
        support = task.support
        vectors = support.prototypes.tolist() if prototypes else [None] * len(support.class_names)
        return cls(
            id=task.task_id,
            model=model,
            version=task.version,
            created=datetime.fromtimestamp(created_s, UTC),
            expires=datetime.fromtimestamp(created_s + bounds.age_s, UTC),
            threshold=support.threshold,
            classes=[
                ClassAnswer(name=name, images=count, prototype=vector)
                for name, count, vector in zip(support.class_names, support.counts.tolist(), vectors, strict=True)
            ],
        )


class TasksAnswer(BaseModel):
    """All tasks of the key."""

    tasks: list[TaskAnswer]


class Candidate(BaseModel):
    """A class that a query may be of."""

    model_config = ConfigDict(populate_by_name=True)
    class_name: str = Field(alias="class")
    probability: float
    distance: float


class QueryAnswer(Candidate):
    """What one query is taken for."""

    file: str = Field(description="Its name as it was sent.")
    none_of_these: bool | None = Field(description="Whether `distance` is beyond the threshold; null where there is none.")
    ranked: list[Candidate] = Field(description="The most probable classes, that of the answer first.")

    @classmethod
    def of(cls, file: str, prediction: "Prediction", *, top: int) -> "QueryAnswer":
        """With the `top` classes."""
        columns = zip(prediction.ranked[:top], prediction.probabilities, prediction.distances, strict=False)
        ranked = [Candidate(class_name=name, probability=chance, distance=away) for name, chance, away in columns]
        return cls(file=file, none_of_these=prediction.rejected, ranked=ranked, **ranked[0].model_dump())


class ClassifyAnswer(BaseModel):
    """What the queries are taken for."""

    threshold: float | None
    results: list[QueryAnswer]

    @classmethod
    def of(
        cls, files: Sequence[str], predictions: "Sequence[Prediction]", threshold: float | None, *, top: int
    ) -> "ClassifyAnswer":
        """In the order of the queries."""
        results = [QueryAnswer.of(file, found, top=top) for file, found in zip(files, predictions, strict=True)]
        return cls(threshold=threshold, results=results)


class EmbeddingsAnswer(BaseModel):
    """Features of images."""

    files: list[str]
    features: list[list[float]]

    @classmethod
    def of(cls, files: Sequence[str], features: "Tensor") -> "EmbeddingsAnswer":
        """Of (N, D) features."""
        return cls(files=list(files), features=features.tolist())


class AttentionAnswer(BaseModel):
    """Where the last block's class token looks."""

    files: list[str]
    grids: list[list[list[float]]] = Field(
        description="Of each image, by rows of patches, the share of attention that each patch gets; all together 1."
    )

    @classmethod
    def of(cls, files: Sequence[str], maps: "Tensor") -> "AttentionAnswer":
        """Of (N, h, w) maps."""
        return cls(files=list(files), grids=maps.tolist())


class ModelAnswer(BaseModel):
    """A model that the service has."""

    name: str = Field(description="For ?model=NAME.")
    digest: str = Field(description="SHA-256 of the backbone's weights, the meta-LoRA's, its metric, and the precision.")
    default: bool = Field(description="Whether it answers requests that name none.")


class ModelsAnswer(BaseModel):
    """All models of the service; they share a backbone."""

    models: list[ModelAnswer]
    image_px: int = Field(description="To this side an image's central square is resized.")
    num_features: int = Field(description="Length of a feature vector.")

    @classmethod
    def of(cls, catalogue: "Catalogue", image_px: int) -> "ModelsAnswer":
        """In the order of the catalogue."""
        models = [
            ModelAnswer(name=model.name, digest=model.digest, default=model == catalogue.default) for model in catalogue.models
        ]
        return cls(models=models, image_px=image_px, num_features=catalogue.num_features)


class StateAnswer(BaseModel):
    """How the service is."""

    status: str
