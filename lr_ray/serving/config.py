"""What is served, and where."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from lr_ray.errors import ConfigError
from lr_ray.serving.models import check_names


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class ServingConfig:
    """What is served, and where.

    Attributes:
        meta_loras: folders or URIs of meta-LoRAs that `lr-ray train` wrote, by name; the first is the default.
        tasks: folder or URI where tasks are kept.
        keys: file of API keys; None for no keys, on this machine only.
        host: to listen on.
        port: of it.
        replicas: of the backbone; the fewest where `max_replicas` is given.
        max_replicas: as many as the load needs, up to these; None for `replicas` always.
        cpus_per_replica: processors of each; None shares out those that Ray has.
        gpus_per_replica: GPUs of each, or a share of one; None shares out those that Ray has, one for each at most.
        precision: of the passes; None for that of the meta-LoRA's run.

    Raises:
        ConfigError: names that meta-LoRAs cannot have, or none; fewer replicas at most than at least.
    """

    meta_loras: Mapping[str, str]
    tasks: str
    keys: Path | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    cpus_per_replica: int | None = Field(default=None, ge=1)
    gpus_per_replica: float | None = Field(default=None, ge=0)
    precision: Literal["auto", "fp32", "bf16"] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ServingConfig":
        check_names(self.meta_loras)
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"{self.replicas} replicas, {self.max_replicas} at most; give the fewest first, such as 1 and 4")
        return self

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "ServingConfig":
        """Of arguments as a person wrote them.

        Raises:
            ConfigError: unknown, missing, or of another kind or range; names that meta-LoRAs cannot have.
        """
        try:
            return cls(**arguments)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            given = "" if first["type"] == "missing" else f" = {first['input']!r}"
            allowed = ", ".join(cls.__dataclass_fields__)
            more = f"; allowed are {allowed}" if first["type"] == "unexpected_keyword_argument" else ""
            raise ConfigError(f"args of the application: {where}{given}: {first['msg']}{more}") from error

    def arguments(self) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = TypeAdapter(ServingConfig).dump_python(self, mode="json")
        return found
