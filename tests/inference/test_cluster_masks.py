"""A stage that clusters images of a source ahead of training, and training rows that hold its masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fake_method import CLASSES, blocks
from ml_collections import ConfigDict

from ovseg_jax.config import STAGE_KINDS
from ovseg_jax.configs import pseg
from ovseg_jax.data.images import fit_canvas
from ovseg_jax.data.rows import Rows
from ovseg_jax.data.source_base import Example, Source
from ovseg_jax.data.sources import build
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.transforms import flip
from ovseg_jax.errors import UserError
from ovseg_jax.experiment import stages
from ovseg_jax.experiment.keys import check_config
from ovseg_jax.inference import cluster_masks
from ovseg_jax.inference.cluster_masks import cluster_stage
from ovseg_jax.methods.pseg import PSeg
from ovseg_jax.models.pseudo_masks import build_generator
from ovseg_jax.vocab.words import WordList

COLOUR = dict(features="colour", space="rgb", blur=0.0, position=0.0, stride=1, clusters=3)
SHOWN = (["red"], ["red", "green"], ["blue", "white", "black"], ["green"], ["yellow", "red"])


class Shown(Source):
    """Images of different sizes in stripes of colours, whose own masks must not be read."""

    name, classes = "shown", CLASSES
    provides = frozenset({"image", "captions", "segments", "class_ids", "boxes"})

    def __len__(self):
        return len(SHOWN)

    def __getitem__(self, index):
        unread = lambda _: pytest.fail("a mask of the source was read")
        size = (24, 48) if index % 2 else (48, 24)
        own = dict.fromkeys(("segments", "class_ids", "isthing", "iscrowd", "boxes"), unread)
        return Example(image=blocks(*size, SHOWN[index]), captions=["a colour"], image_id=str(index), **own)


@pytest.fixture
def stage(monkeypatch):
    monkeypatch.setattr(build, "import_class", lambda *_: Shown)
    source = dict(name="shown", fields=["image", "captions"])
    base = dict(generator=COLOUR, source=source, image_size=48, batch_size=2, shard_size=3)
    return lambda folder, **own: cluster_stage(epath.Path(folder), **base | own)


def read(folder):
    return make_source(dict(name="shown", fields=["image", "captions"], masks=str(folder)))


def test_a_stage_writes_the_clusters_that_a_source_reads(stage, tmp_path, capsys):
    assert stage(tmp_path) == {}
    assert "5 images labelled" in capsys.readouterr().out
    source = read(tmp_path)
    for k, row in enumerate(SHOWN):
        image, segments = source[k]["image"], source[k]["segments"]
        assert segments.shape == image.shape[:2] and len(np.unique(segments)) == len(row)
        assert sorted(set(segments.ravel())) == list(range(1, len(row) + 1))
        assert source[k]["class_ids"].tolist() == [-1] * len(row)
        for number in range(1, len(row) + 1):
            assert len(np.unique(image[segments == number], axis=0)) == 1
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.zip")}
    stage(tmp_path)
    assert done == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.zip")}
    with pytest.raises(UserError, match="was made with another image_size: 48, not 64"):
        stage(tmp_path, image_size=64)


def test_segments_of_a_scaled_image_have_its_own_size(stage, tmp_path):
    stage(tmp_path / "small", image_size=20)
    source = read(tmp_path / "small")
    for k, row in enumerate(SHOWN):
        image, segments = source[k]["image"], source[k]["segments"]
        assert segments.shape == image.shape[:2]
        edges = image.shape[1] * np.arange(1, len(row)) / len(row)
        inner = (abs(np.arange(image.shape[1])[:, None] + 0.5 - edges) > 4).all(1)  # scaling mixes the others
        for number in np.unique(segments[:, inner]):
            assert len(np.unique(image[:, inner][segments[:, inner] == number], axis=0)) == 1


def test_its_segments_are_those_of_the_generator(stage, tmp_path):
    stage(tmp_path)
    generator, source = build_generator(COLOUR), read(tmp_path)
    for k, row in enumerate(SHOWN):
        height, width = source[k]["image"].shape[:2]
        canvas, size = fit_canvas(source[k]["image"], 48)
        want = generator.apply({}, jnp.asarray(canvas)[None], jnp.array([size]), method="segments")[0]
        own = np.asarray(want)[:height, :width].ravel().tolist()
        assert len({*zip(own, source[k]["segments"].ravel().tolist(), strict=True)}) == len(row)


def test_geometry_moves_the_masks_with_the_image(stage, tmp_path):
    stage(tmp_path)
    source = read(tmp_path)
    config = dict(seed=0, steps=9, batch_size=1, data=dict(image_size=24, mask_stride=1, max_masks=3))
    rows = Rows.from_config(config, ["image", "masks"])
    mirrored = 0
    for index in range(6):
        row = rows(index, source[4])
        assert row["mask_valid"].tolist() == [True, True, False]
        for mask in row["masks"][:2] > 0:
            colours = row["image"][mask]
            assert np.all(colours == np.median(colours, 0), 1).mean() > 0.8
        mirrored += np.array_equal(
            row["image"], rows.geometry(flip(source[4]), np.random.default_rng(0), False)[0]["image"]
        )
    assert 0 < mirrored < 6


def test_pseg_takes_masks_that_were_made_ahead(tmp_path):
    """`scenes` gives its images and captions alone; the masks of the rows are those of the stage."""
    config = pseg.get_config("ahead=true,images=6")
    check_config(config)
    (stage,) = config.stages
    assert "masks" in PSeg.fields(config) and config.get("pseudo_masks") is None
    cluster_stage(epath.Path(tmp_path), **ConfigDict(stage["config"]).to_dict())
    (source,) = config.data.train
    source = make_source(dict(source, masks=str(tmp_path)))
    assert "segments" not in source.source.source.provides  # Cached, PseudoMasks, Restricted
    words = WordList(PSeg.vocabulary(config, source))
    row = Rows.from_config(config, PSeg.fields(config), words)(0, source[3])
    assert row["masks"].shape == (6, 64, 64) and 2 < row["mask_valid"].sum() <= 6
    assert (row["masks"].astype(int).sum(0) == 255).all()


def test_devices_share_a_batch(stage, tmp_path, monkeypatch):
    assert jax.local_device_count() > 1
    stage(tmp_path / "many")
    monkeypatch.setattr(cluster_masks.jax, "local_devices", lambda: [])
    stage(tmp_path / "one")
    for k in range(5):
        many, one = (read(tmp_path / name)[k]["segments"] for name in ("many", "one"))
        np.testing.assert_array_equal(many, one)


def test_the_stage_is_known_and_wrong_requests_are_named(stage, tmp_path):
    assert "cluster" in STAGE_KINDS and stages._function("cluster") is cluster_stage
    tower = dict(features="tower", backbone=dict(name="dino_vits8"))
    with pytest.raises(UserError, match=r"features='tower' need backbone\.init"):
        stage(tmp_path, generator=tower)
    with pytest.raises(UserError, match="batch_size=0 is less than 1"):
        stage(tmp_path, batch_size=0)
    with pytest.raises(UserError, match="shard_size=0 is less than 1"):
        stage(tmp_path, shard_size=0)
    with pytest.raises(UserError, match=r"generator\.mask_stride has no effect"):
        stage(tmp_path, generator=dict(COLOUR, mask_stride=1))
    with pytest.raises(UserError, match="features='edges' of pseudo-masks is not one of"):
        stage(tmp_path, generator=dict(features="edges"))
