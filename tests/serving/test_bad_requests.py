"""Whatever is asked, a server answers with what its schema promises, and lives."""

import pytest

from tests.marks import nightly
from tests.serving import bad_requests

pytestmark = [
    pytest.mark.xdist_group("pipeline"),
    # Of schemathesis and what it calls, about each other.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("count", [100, *nightly(1000)], ids=["some", "all"])
def test_bad_requests_are_refused_in_one_line_and_kill_nothing(client, count):
    found = bad_requests.ask(str(client.base_url).rstrip("/"), count)
    assert sum(found.values()) >= count
    statuses = {status for _, status in found}
    assert 200 in statuses
    assert 400 in statuses
    assert not {status for status in statuses if status >= 500}
    if count >= 1000:  # so many get beyond the checks of fields, to where pictures are made
        paths = client.get("/openapi.json").json()["paths"]
        made = {path for path, status in found if status == 200}
        assert {path for path, operations in paths.items() if "post" in operations} <= made
    assert client.get("/health").status_code == 200
