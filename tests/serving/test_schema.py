"""Whatever its own description allows, and what it does not: no 5xx, and answers as /openapi.json says."""

from contextlib import suppress

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from torch import Tensor

from lr_ray.serving.api import Service, make_app

CHECKED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 12
"""Of each operation, of each kind."""
HOST = {"host": "127.0.0.1"}


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_is_a_fault_and_every_answer_is_as_described(service: Service, mode: GenerationMode):
    async def look(pixels: Tensor, _model: str) -> Tensor:
        return torch.full((len(pixels), 2, 2), 0.25)

    service.attend = look
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(service), headers=HOST)
    tried: list[str] = []
    labels: list[str] = []

    for found in schema.get_all_operations():
        operation = found.ok()
        assert operation is not None, found
        labels.append(operation.label)

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def run(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=HOST, checks=CHECKED)

        with suppress(Unsatisfiable):  # what has no parameters cannot be called wrongly
            run()
            tried.append(operation.label)
    positive = mode == GenerationMode.POSITIVE
    assert {label for label in labels if positive or label.startswith("POST")} <= set(tried)
