"""Requests that schemathesis makes of a server's own OpenAPI schema, valid ones and broken ones.

    python -m tests.serving.bad_requests http://127.0.0.1:8000 1000

asks a running server so many, and prints a table of what it answered. Every answer is checked:
no 5xx, a status, headers and a body that the schema promises, no success for what the schema
forbids, and of a refusal one line. The server's process must be the same at the end.
"""

import argparse
import base64
import collections
import sys

import hypothesis
import numpy as np
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks

from univg_jax import images

CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
]
# A form cannot say all that breaks a schema: of an empty list, nothing is sent.
CHECKS_OF_JSON = [*CHECKS, openapi_checks.negative_data_rejection]
REFUSED = (400, 401, 404, 405, 408, 413, 415, 429)


def _pictures() -> st.SearchStrategy[bytes]:
    """Mostly small pictures, of few shapes and values, so that some fit as masks; some are none."""
    sides = st.sampled_from([1, 32, 32, 40])
    whole = st.builds(
        lambda height, width, value: images.png_bytes(np.full((height, width, 3), value, np.uint8)),
        sides,
        sides,
        st.sampled_from([0, 128, 255, 255]),
    )
    halves = st.builds(lambda data, part: data[: len(data) // part], whole, st.integers(2, 9))
    return st.one_of(whole, whole, whole, whole, halves, st.binary(max_size=100))


def register() -> None:
    """Makes schemathesis draw pictures for the schema's formats."""
    encoded = _pictures().map(lambda data: base64.b64encode(data).decode())
    schemathesis.openapi.format("picture", encoded)
    schemathesis.openapi.format("binary", _pictures())


def one_line(response: requests.Response) -> str:
    """The message of a refusal. Fails where it is not one clear line."""
    message = response.json()["error"]["message"]
    assert message.strip(), response.text
    assert message.isprintable(), message
    assert len(message) < 1000, message
    return message


def ask(address: str, count: int) -> collections.Counter[tuple[str, int]]:
    """How often each route answered with each status. Fails with the request that broke a rule."""
    register()
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    found: collections.Counter[tuple[str, int]] = collections.Counter()
    before = process(address)
    # A third is valid by the schema, as far as a schema says it.
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE, GenerationMode.NEGATIVE]
    strategies = [
        operation.ok().as_strategy(generation_mode=mode)
        for operation in schema.get_all_operations()
        for mode in modes
        if mode is GenerationMode.POSITIVE or operation.ok().body
    ]

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=st.one_of(strategies))
    def check(case: schemathesis.Case) -> None:
        response = case.call(timeout=600)
        is_form = case.media_type == "multipart/form-data"
        case.validate_response(response, checks=CHECKS if is_form else CHECKS_OF_JSON)
        found[case.operation.path, response.status_code] += 1
        if response.status_code in REFUSED:
            one_line(response)

    check()
    assert process(address) == before, "the server is another process"
    return found


def process(address: str) -> float:
    """When the server's process was started: a worker that died has another one."""
    models = requests.get(f"{address}/v1/models", timeout=60).json()
    return models["data"][0]["created"]


def table(found: collections.Counter[tuple[str, int]]) -> str:
    """As Markdown."""
    statuses = sorted({status for _, status in found})
    lines = [
        "| route | " + " | ".join(map(str, statuses)) + " |",
        "|---" * (len(statuses) + 1) + "|",
    ]
    for route in sorted({route for route, _ in found}):
        counts = [str(found[route, status] or "") for status in statuses]
        lines.append(f"| `{route}` | " + " | ".join(counts) + " |")
    totals = [str(sum(n for (_, s), n in found.items() if s == status)) for status in statuses]
    return "\n".join([*lines, "| all | " + " | ".join(totals) + " |"])


def main() -> None:
    """Asks the server that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("count", type=int)
    args = parser.parse_args()
    print(table(ask(args.address.rstrip("/"), args.count)))


if __name__ == "__main__":
    sys.exit(main())
