"""Generated requests, well and badly formed, against the port's own OpenAPI document."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi import checks as openapi

from kvkeep.server.app import create_app
from kvkeep.server.options import ServerOptions
from kvkeep.server.store import TenantStore
from kvkeep.server.tenants import TenantFile
from tests.counts import examples
from tests.server.fakes import MODEL, ByteText, FakeEngine

Operation = APIOperation[Any, Any, Any, Any]
Case = schemathesis.Case[Any]

CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
    openapi.negative_data_rejection,
    openapi.unsupported_method,
]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> BaseSchema:
    file = TenantFile(tmp_path_factory.mktemp("schema") / "tenants.json")
    key = file.add("acme", share=1.0).text
    app = create_app(FakeEngine(), ByteText(), TenantStore.open(file.path), ServerOptions())
    headers = {"Authorization": f"Bearer {key}"}
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)


def test_well_formed_requests_keep_the_contract(api: BaseSchema) -> None:
    for operation in _operations(api):
        _check(operation, GenerationMode.POSITIVE)


def test_badly_formed_requests_keep_the_contract(api: BaseSchema) -> None:
    bodies = [operation for operation in _operations(api) if operation.body]
    assert len(bodies) == 4
    for operation in bodies:
        _check(operation, GenerationMode.NEGATIVE)


def _operations(api: BaseSchema) -> list[Operation]:
    results = list(api.get_all_operations())
    operations = [result.ok() for result in results if isinstance(result, Ok)]
    assert len(operations) == len(results)
    assert {"/v1/chat/completions", "/v1/completions"} <= {o.path for o in operations}
    return operations


def _check(operation: Operation, mode: GenerationMode) -> None:
    @settings(
        max_examples=examples(8, 20),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def holds(case: Case) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = MODEL
        case.call_and_validate(checks=CHECKS)

    holds()
