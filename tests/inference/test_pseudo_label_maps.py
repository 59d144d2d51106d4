"""Label maps by a teacher that sees colours, as shards; and a chain of teacher, labels and student on `scenes`."""

import json

import numpy as np
import pytest
from etils import epath
from fake_method import CLASSES, ColourMethod, blocks, config

from ovseg_jax.configs import upernet
from ovseg_jax.data.scenes.source import Scenes
from ovseg_jax.data.source_base import Example, Source
from ovseg_jax.data.sources import build
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.sources.pseudo_masks import PseudoMasks, read_shard
from ovseg_jax.data.transforms import class_map
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.run import train
from ovseg_jax.inference import pseudo_masks, segmenter
from ovseg_jax.inference.pseudo_label_maps import label_map_stage
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.vocab.classes import ClassList, with_names

ROWS = (["red"], ["red", "green"], ["blue", "white", "black"], ["green"], ["yellow", "red"])


class Target(Source):
    """Images of colours, of two sizes; nobody may look at their masks."""

    name, provides = "target", frozenset({"image", "segments", "class_ids", "boxes", "region_captions"})
    # Classes in another order than the teacher's colours, with synonyms and a group.
    classes = ClassList(
        (("green",), ("red", "red red"), ("rest",), ("white",), ("blue",)),
        (0, 1, 2, 3, 4),
        (True, True, False, True, False),
        {"held_out": (1,), "other": (0, 2)},
    )

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        def unread(_):
            raise AssertionError("a mask of the target was read")

        fields = dict.fromkeys(("segments", "class_ids", "isthing", "iscrowd", "boxes"), unread)
        return Example(image=blocks(24 + index, 40, ROWS[index]), image_id=f"t-{index}", **fields)


@pytest.fixture
def stage(monkeypatch):
    loads = []

    def load(cls, workdir, *, batch_size=8, devices=()):
        loads.append(workdir)
        method = ColourMethod(masks=str(workdir) != "pixels")
        return cls(method, method.init(None), config(32), CLASSES, batch_size=batch_size, devices=devices)

    monkeypatch.setattr(Segmenter, "from_checkpoint", classmethod(load))
    monkeypatch.setitem(build.SOURCES, "target", f"{__name__}:Target")
    monkeypatch.setattr(build, "import_class", lambda *_: Target)
    fixed = dict(teacher="run", source=dict(name="target"), shard_size=2, batch_size=2)
    names = dict(rest=["yellow", "black"])

    def call(folder, **own):
        label_map_stage(epath.Path(folder), **fixed | dict(names=names) | own)
        return make_source(dict(name="target", masks=str(folder)))

    call.loads = loads
    return call


def colours(example, classes):
    """The class names of an image's columns, in the middle row."""
    found = class_map(example["segments"], example["class_ids"])[12]
    return [classes.display(int(k)) if k >= 0 else "" for k in found]


@pytest.mark.parametrize("teacher", ["run", "pixels"])
def test_classes_of_pixels_become_segments(stage, tmp_path, teacher):
    source = stage(tmp_path, teacher=teacher)
    assert source.classes.names == Target.classes.names
    assert source.classes.groups == {"other": (0, 2)} and "region_captions" not in source.provides
    known = {"yellow": "rest", "black": "rest"}
    for k, row in enumerate(ROWS):
        example = source[k]
        assert example["segments"].shape == (24 + k, 40)
        found = colours(example, source.classes)
        width = 40 / len(row)
        for i, colour in enumerate(row):
            assert found[int((i + 0.5) * width)] == known.get(colour, colour)
        assert len(set(example["class_ids"].tolist())) == len(example["class_ids"])
        assert example["isthing"].tolist() == [source.classes.isthing[c] for c in example["class_ids"]]
        assert example["boxes"].shape == (len(example["class_ids"]), 4)
    facts = json.loads((tmp_path / "statistics.json").read_text())
    assert facts["images"] == 5 and facts["masks"] == [0, 2, 2, 1] and facts["covered"] == 5.0
    assert (tmp_path / "sheet.png").exists()


def test_pixels_without_a_category(stage, tmp_path):
    """They are void, or a class that is never asked for."""
    rule = dict(type="background_threshold", threshold=0.5)
    own = dict(names={}, teacher="pixels", decision=rule, labels="red; green; other")
    found = stage(tmp_path / "void", **own | dict(labels="red; green"))
    assert colours(found[2], found.classes)[20] == "" and colours(found[1], found.classes)[5] == "red"
    assert found[2]["class_ids"].tolist() == []
    found = stage(tmp_path / "class", **own, background="other")
    assert set(colours(found[2], found.classes)) == {"other"}
    assert set(colours(found[1], found.classes)) <= {"red", "green", "other"}
    added = stage(tmp_path / "added", **own | dict(labels="red; green"), background="void")
    assert added.classes.names == (("red",), ("green",), ("background",))
    for k in range(len(ROWS)):
        renamed = [name.replace("other", "background") for name in colours(found[k], found.classes)]
        assert colours(added[k], added.classes) == renamed
    with pytest.raises(UserError, match="adds a class 'background', which there is"):
        stage(tmp_path / "twice", **own | dict(labels="red; background"), background="void")


def test_a_protocol_labels_in_windows(stage, tmp_path, monkeypatch):
    """As the teacher was evaluated (papers/002, C.2): the segments are those of the Segmenter's results."""
    windows = dict(stride=8, short=16, longest=64)
    rules = dict(image_size=16, windows=windows, decision=dict(type="semantic", threshold=0.5))
    monkeypatch.setattr(segmenter, "published", lambda name: {"pseg_voc": rules}[name])
    source = stage(tmp_path / "windows", protocol="pseg_voc")
    teacher = Segmenter.from_checkpoint("run")
    asked = with_names(source.classes, dict(rest=["yellow", "black"]))
    for k in range(2):
        found = class_map(source[k]["segments"], source[k]["class_ids"])
        result = teacher.segment(source[k]["image"], asked, protocol="pseg_voc")
        np.testing.assert_array_equal(found, result.label_map)
    assert colours(source[1], source.classes)[::39] == ["red", "green"]
    (request,) = {
        json.dumps(read_shard(path).request["decision"]) for path in (tmp_path / "windows").glob("*.zip")
    }
    assert request == '"pseg_voc"'
    with pytest.raises(UserError, match="protocol='pseg_voc' has a decision of its own"):
        stage(tmp_path / "both", protocol="pseg_voc", decision="semantic")
    with pytest.raises(UserError, match="the protocol 'pseg' is not one of voc"):
        stage(tmp_path / "wrong", protocol="pseg")


def test_devices_share_a_batch(stage, tmp_path, monkeypatch):
    many = stage(tmp_path / "many")
    monkeypatch.setattr(pseudo_masks.jax, "local_devices", lambda: [])
    one = stage(tmp_path / "one")
    for k in range(5):
        np.testing.assert_array_equal(many[k]["segments"], one[k]["segments"])


def test_what_was_stopped_goes_on(stage, tmp_path, monkeypatch):
    whole, count = pseudo_masks.write_shard, []

    def stopped(*arguments):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(pseudo_masks, "write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path)
    assert len(list(tmp_path.glob("*.zip"))) == 1
    stage(tmp_path)
    assert len(count) == 2 + 2 and len(stage.loads) == 2
    stage(tmp_path)
    assert len(stage.loads) == 2
    assert read_shard(tmp_path / "masks-00000-of-00003.zip").classes is not None
    with pytest.raises(UserError, match="made with another decision"):
        stage(tmp_path, decision=dict(type="background_threshold", threshold=0.5))
    with pytest.raises(UserError, match="made with another names"):
        stage(tmp_path, names=dict(rest=["yellow"]))


def test_wrong_requests(stage, tmp_path, monkeypatch):
    for own, message in (
        (dict(background="nothing"), "background='nothing' is not one of the classes"),
        (dict(decision="best"), "the decision 'best' is not one of"),
        (dict(names=dict(none=["a"])), "no class 'none'"),
        (dict(shard_size=0), "shard_size=0 is less than 1"),
    ):
        with pytest.raises(UserError, match=message):
            stage(tmp_path, **own)
    monkeypatch.setattr(Target, "classes", ClassList((), (), ()))
    with pytest.raises(UserError, match="target has no classes: give labels="):
        stage(tmp_path)


def shrunk(arg):
    config = upernet.get_config(arg)
    config.update(dict(steps=2, batch_size=8, log_every=1))
    config.model.update(dict(width=8, aux_width=4))
    config.model.backbone.width = 16
    config.checkpoint.every = 1
    config.data.train[0]["num_examples"] = 6
    test = config.final_evals.test
    test.source.num_examples, test.batch_size = 8, 8
    return config


def test_a_teacher_labels_images_for_a_student(tmp_path, monkeypatch):
    """Every training image of the student is unlabelled; a killed run goes on to the same numbers."""
    teacher = shrunk("")
    train(teacher, tmp_path / "teacher")
    config = shrunk(f"teacher={tmp_path / 'teacher'}")
    config.stages[0]["config"].update(dict(shard_size=2, batch_size=2))
    config.stages[0]["config"]["source"]["num_examples"] = 6
    asked, plain = [], Scenes.__getitem__

    def unread(_):
        raise AssertionError("a mask of the target was read")

    def unlabelled(self, index):
        example = plain(self, index)
        if self.seed != 1:  # the validation and test images
            return example
        asked.append(index)
        fields = {field: (lambda _, f=field: example[f]) for field in example}
        return Example(**fields | dict(segments=unread, class_ids=unread, boxes=unread))

    monkeypatch.setattr(Scenes, "__getitem__", unlabelled)
    whole = train(config, tmp_path / "whole")
    assert asked and 0 <= whole["test/miou"] <= 100

    written, count = pseudo_masks.write_shard, []

    def stopped(*arguments):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        written(*arguments)

    monkeypatch.setattr(pseudo_masks, "write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "again")
    again = train(config, tmp_path / "again")
    assert len(count) == 3 + 1
    masks = [
        PseudoMasks(Scenes("validation", 6, seed=1), tmp_path / run / "labels") for run in ("whole", "again")
    ]
    for k in range(6):
        np.testing.assert_array_equal(masks[0][k]["segments"], masks[1][k]["segments"])
    scores = lambda summary: {key: value for key, value in summary.items() if "/" in key}
    assert scores(again) == pytest.approx(scores(whole))
