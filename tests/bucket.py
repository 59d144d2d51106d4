"""A bucket gs://bucket in memory, for tests of what is read from and written to one."""

import importlib.util
import os

import pytest
from etils import epath
from etils.epath import backend

from tests.extras import require


@pytest.fixture
def bucket(monkeypatch, tmp_path_factory):
    """An empty folder in a bucket."""
    fsspec = require("fsspec")
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("with TensorFlow, etils reads buckets by TensorFlow")
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        store, pseudo_dirs, cachable = {}, [""], False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(os.fspath(path).removeprefix("gs://"))

        def open(self, path, mode="rb", **options):
            if "r" not in mode:
                return super().open(path, mode, **options)
            # Beartype takes neither MemoryFile nor BytesIO for an `IO`, which has a name and a mode.
            copy = tmp_path_factory.mktemp("bucket") / "file"
            copy.write_bytes(super().open(path, "rb").read())
            return copy.open(mode)

    own = Bucket()
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **options: own)
    backend.fsspec_backend._get_filesystem.cache_clear()
    folder = epath.Path("gs://bucket/run")
    folder.mkdir(parents=True)
    yield folder
    backend.fsspec_backend._get_filesystem.cache_clear()
