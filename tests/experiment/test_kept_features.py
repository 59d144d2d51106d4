"""Features that a run keeps: computed once, and anew where they are damaged or of other data."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from ovseg_jax.data import pipeline
from ovseg_jax.data.source_base import Example
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.experiment import features


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A function that asks for the features of the first images, and the list of how many were computed when."""
    computed = []

    def compute(config, parts, batches, count):
        computed.append(count)
        return np.arange(count * 3, dtype=np.float32).reshape(count, 3)

    monkeypatch.setattr(features, "_compute", compute)
    monkeypatch.setattr(pipeline, "view_batches", lambda *_, **__: iter(()))
    config = ConfigDict(
        {"data": {"cache_features": 2, "image_size": 32}, "seed": 0, "steps": 1, "batch_size": 4}
    )

    def ask(shots):
        source = make_source({"name": "scene_objects", "split": "test", "shots": shots, "image_size": 32})
        return features.cached_features(config, epath.Path(tmp_path), SimpleNamespace(words=None), source)

    return ask, computed, tmp_path / "features"


def test_features_are_computed_once(kept, caplog):
    ask, computed, folder = kept
    caplog.set_level(logging.WARNING)
    first = ask(1)
    assert [row["feature"].shape for row in first][:1] == [(2, 3)] and len(computed) == 1
    np.testing.assert_array_equal(ask(1)[3]["feature"], first[3]["feature"])
    assert len(computed) == 1 and not caplog.records

    for damage in (lambda data: data[:-1] + b"x", lambda data: data[:-4], lambda data: b""):
        path = folder / "features.npy"
        path.write_bytes(damage(path.read_bytes()))
        caplog.clear()
        np.testing.assert_array_equal(ask(1)[3]["feature"], first[3]["feature"])
        assert "features.npy" in caplog.text and "computed again" in caplog.text
    for content in ("{}", "{", "\0", "[]"):
        (folder / "done.json").write_text(content)
        caplog.clear()
        ask(1)
        assert "computed again" in caplog.text
    assert len(computed) == 8


def test_features_of_other_images_are_computed_anew(kept, caplog, monkeypatch):
    ask, computed, _ = kept
    ask(1)
    from ovseg_jax.data.scenes.objects import SceneObjects

    whole = SceneObjects.__getitem__

    def renamed(self, index):
        example = whole(self, index)
        return Example(**{k: example[k] for k in ("label",)}, image_id="x" + example["image_id"])

    monkeypatch.setattr(SceneObjects, "__getitem__", renamed)
    ask(1)
    assert len(computed) == 2 and "features of other data" in caplog.text
