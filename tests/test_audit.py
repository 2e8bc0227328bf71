"""The locked packages have no vulnerability that is known to the service that pip-audit asks."""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.nightly

ROOT = pathlib.Path(__file__).parents[1]
KNOWN = "jinja2==2.10"  # has vulnerabilities, which a service that answers tells


def audit(requirements: pathlib.Path) -> tuple[list[str], str]:
    """The packages with a known vulnerability, and what else pip-audit said."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip_audit", f"--requirement={requirements}", "--no-deps"),
            *("--disable-pip", "--format=json", "--progress-spinner=off"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if not done.stdout:
        return [], done.stderr.strip().splitlines()[-1]
    found = json.loads(done.stdout)["dependencies"]
    reasons = [package["skip_reason"] for package in found if "skip_reason" in package]
    return [
        f"{package['name']} {package['version']}: {vulnerability['id']}"
        for package in found
        for vulnerability in package.get("vulns", ())
    ], "; ".join(reasons)


def test_no_locked_package_has_a_known_vulnerability(tmp_path):
    probe = tmp_path / "known.txt"
    probe.write_text(f"{KNOWN}\n")
    known, reason = audit(probe)
    if not known:
        pytest.skip(f"no service tells the vulnerabilities of {KNOWN}: {reason}")
    for lock in ("requirements.lock", "requirements-parity.lock"):
        found, reason = audit(ROOT / lock)
        assert found == []
        assert reason == ""  # no package was left out
