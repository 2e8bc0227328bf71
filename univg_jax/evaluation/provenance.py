"""Which run this is: when, by which version of the code, on which machine."""

import datetime
import importlib.metadata
import pathlib
import platform
import subprocess

import jax


def provenance() -> dict[str, str]:
    """The date (UTC), the package's version, the revision of its checkout, and the machine."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "version": importlib.metadata.version("univg_jax"),
        "revision": revision(),
        "machine": f"{platform.node()} ({platform.machine()}), {jax.device_count()} x "
        f"{device.device_kind}, {jax.process_count()} process(es)",
    }


def revision() -> str:
    """The commit of the checkout that this package lies in, with "+ changes" if it has any."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(pathlib.Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if not git("ls-files", __file__):  # installed below another project's checkout
            return "unknown"
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" + changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
