"""The contracts hold a method that they have never seen: it trains, evaluates, segments, resumes, by its name alone."""

import json

import jax
import numpy as np
import pytest
import tiny

from ovseg_jax.data.sources.build import make_source
from ovseg_jax.errors import UserError
from ovseg_jax.evals import panoptic_quality as quality
from ovseg_jax.experiment.load import load_run
from ovseg_jax.experiment.run import train
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.train import loop


def config(steps=6):
    found = tiny.get_config(f"steps={steps}")
    found.method, found.batch_size = "toy_method:Toy", 8
    for section in ("model", "text", "loss"):
        del found[section]
    decision = dict(type="panoptic", overlap_threshold=0.5)
    test = found.final_evals.test
    test.decision = decision
    own = dict(source=test.source, batch_size=4)
    found.final_evals.panoptic = dict(own, type="panoptic", decision=decision)
    found.final_evals.instances = dict(own, type="instances")
    return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    train(config(), folder)
    return folder


def test_it_trains_and_leaves_a_summary(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 6 and 0 <= summary["test/miou"] <= 100 and "test/recall@0.5" in summary
    assert {"panoptic/pq", "panoptic/rq/stuff", "instances/ap", "instances/ap50"} <= set(summary)
    first, *_, last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(first["loss"]) and last["step"] == 6


def test_it_segments_by_the_panoptic_decision(workdir):
    source = make_source(dict(name="scenes", split="test", num_examples=4, image_size=32))
    image, labels = source[0]["image"], source.classes
    segmenter = Segmenter.from_checkpoint(workdir)
    result = segmenter.segment(image, labels, decision="panoptic")
    assert result.segments and result.label_map.shape == image.shape[:2]
    for segment in result.segments:
        assert (
            result.label_map[segment.mask] == segment.category
        ).all() and segment.area == segment.mask.sum()
        assert (
            segment.isthing == labels.isthing[segment.category] and (segment.instance > 0) == segment.isthing
        )
    stuff = [segment.category for segment in result.segments if not segment.isthing]
    assert len(set(stuff)) == len(stuff)
    picture, rows = result.panoptic()
    ids = np.asarray(picture).astype(int) @ [1, 256, 65536]
    assert {row["id"] for row in rows} == set(np.unique(ids)) - {0}
    assert [row["area"] for row in rows] == [int((ids == row["id"]).sum()) for row in rows]
    things = segmenter.segment(image, labels, decision={"type": "instances", "top": 5})
    assert 0 < len(things.segments) <= 5 and all(segment.isthing for segment in things.segments)
    plain = segmenter.segment(image, labels, decision="argmax")
    assert {segment.instance for segment in plain.segments} == {0}
    with pytest.raises(UserError, match="Panoptic works on whole images"):
        segmenter.segment(image, labels, decision="panoptic", tile=(16, 4))


def test_its_panoptic_pictures_have_the_quality_that_the_summary_states(workdir):
    """From predictions on the mesh, and from the PNGs that Segmenter makes of the same images."""
    source = make_source(dict(name="scenes", split="test", num_examples=6, image_size=32))
    segmenter, classes = Segmenter.from_checkpoint(workdir), source.classes
    total = None
    for example in (source[i] for i in range(len(source))):
        decision = {"type": "panoptic", "overlap_threshold": 0.5}
        picture, rows = segmenter.segment(example["image"], classes, decision=decision).panoptic()
        ids = np.asarray(picture).astype(int) @ [1, 256, 65536]
        shared = quality.overlaps(ids, example["segments"])
        category = np.array([list(classes.ids).index(row["category_id"]) for row in rows])
        predicted = np.full(int(ids.max()), -1)
        predicted[[row["id"] - 1 for row in rows]] = category
        visible = np.isin(np.arange(1, len(example["class_ids"]) + 1), example["segments"])
        true = np.where(visible, example["class_ids"], len(classes))
        image = quality.tally(shared, predicted, true, example["iscrowd"], len(classes))
        total = quality.add(total, image)
    summary = json.loads((workdir / "summary.json").read_text())
    for name, value in quality.scores(total, classes.isthing, classes.groups).items():
        assert summary[f"panoptic/{name}"] == pytest.approx(value)
    assert total.fp.sum() > 0 and total.fn.sum() > 0


def test_a_run_that_died_goes_on_to_the_same_parameters(workdir, tmp_path, monkeypatch):
    write = loop.MetricWriter.scalars

    def dies(self, step, values):
        if step >= 5:
            raise RuntimeError("killed")
        return write(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricWriter, "scalars", dies)
        with pytest.raises(RuntimeError, match="killed"):
            train(config(), tmp_path)
    train(config(), tmp_path)
    whole, again = (load_run(folder).variables for folder in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_names_that_are_no_method_are_said(tmp_path):
    for name, said in (
        ("toy_method:Missing", "cannot be imported"),
        ("toy_method:unit", "does not derive from"),
        ("openclip", "is not one of openseg"),
    ):
        wrong = config()
        wrong.method = name
        with pytest.raises(UserError, match=said):
            train(wrong, tmp_path)
