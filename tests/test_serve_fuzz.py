"""The API fuzzed from its own OpenAPI document: whatever is sent, no server error, and only answers that it promises.

A small deterministic budget in every run; ``ACE_FUZZ=300`` gives each operation 300 examples.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from ace_core.config import ServeSettings, Settings
from serve.auth import new_key
from serve.http import build_http
from tests.serving_world import WordBackend, draw_corpus, publish

EXAMPLES = int(os.environ.get("ACE_FUZZ", "40"))
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store, and an admin key for it: with a key, no operation ends at the gate."""
    folder = tmp_path_factory.mktemp("fuzz")
    publish(folder / "store", folder / "corpus", draw_corpus(folder / "corpus"))
    secret, line = new_key("admin", "fuzz")
    (folder / "keys.txt").write_text(line)
    return folder, secret


@pytest.fixture(scope="module")
def api(guarded: tuple[Path, str]) -> schemathesis.BaseSchema:
    folder, _ = guarded
    store = str(folder / "store")
    app = build_http(Settings(store=store, serve=ServeSettings(keys_file=str(folder / "keys.txt"))), WordBackend(store))
    assert TestClient(app).get("/readyz").status_code == 200
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_api_keeps_its_word(api: schemathesis.BaseSchema, guarded: tuple[Path, str], mode: GenerationMode) -> None:
    asked: Counter[str] = Counter()
    for operation in (found.ok() for found in api.get_all_operations()):

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: schemathesis.Case) -> None:
            answer = case.call(headers={"Authorization": f"Bearer {guarded[1]}"})
            asked[case.operation.label] += 1
            case.validate_response(answer, checks=CHECKS)

        try:
            ask()
        except Unsatisfiable:
            # Nothing can be sent that it does not take: it has no parameters, or any text is one.
            assert mode is GenerationMode.NEGATIVE and not operation.body, operation.label
    assert {"POST /v1/search", "POST /v1/search/by-example", "GET /thumb/{item_id}"} <= set(asked)
