"""A bucket without a cloud, in memory: a fixture of several folders."""

import fsspec
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem


class Buckets(MemoryFileSystem):
    """Paths `gs://BUCKET/...`, in memory."""

    protocol = ("gcs", "gs")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs:/"))

    def glob(self, path, **options):
        return [found.lstrip("/") for found in super().glob(path, **options)]


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """The path of a bucket. A folder named `gs:` on the local disk fails the test."""
    buckets = Buckets(skip_instance_cache=True)
    buckets.store, buckets.pseudo_dirs = {}, [""]
    monkeypatch.setattr(
        backend.fsspec_backend,
        "_get_filesystem",
        lambda name: buckets if name == "gcs" else fsspec.filesystem(name),
    )
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    buckets.mkdir("gs://bucket")
    yield epath.Path("gs://bucket")
    assert list(work.iterdir()) == []
