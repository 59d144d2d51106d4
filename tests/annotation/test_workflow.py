"""The whole workflow on `scenes`, by annotators that know the truth, err, raise, return nonsense or are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax import annotate as command
from ovseg_jax import score
from ovseg_jax.annotation import outputs
from ovseg_jax.annotation.run import RECORDS, Runner, annotate_source, read_records
from ovseg_jax.annotation.stage import annotate_stage
from ovseg_jax.annotation.statistics import area_name
from ovseg_jax.annotation.workflow import Annotator, Rules
from ovseg_jax.config import resolved
from ovseg_jax.data.scenes.source import Scenes
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.stages import check_finished, run_stages
from tests.annotation import scene_plugs
from tests.annotation.scene_plugs import perfect
from tests.extras import require

ROOT = Path(__file__).parents[2]
COUNT = 12


def config(count=COUNT):
    return dict(name="scenes", split="test", num_examples=count, image_size=64)


def names_in(out):
    """How often each image has a record."""
    return Counter(record["image"] for record in read_records(epath.Path(out)) if "error" not in record)


@pytest.fixture(autouse=True)
def two_pictures(monkeypatch, request):
    """Draws fewer pictures, which takes most of the time; those of `annotated` are drawn before."""
    request.getfixturevalue("annotated")
    monkeypatch.setattr(outputs, "SHOWN", 2)


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    out = tmp_path_factory.mktemp("annotated")
    rules = Rules(stuff_regions=True)
    return out, annotate_source(config(), perfect(), rules, out, batch=3, shard_size=5)


def test_what_a_perfect_annotator_says_is_read_back(annotated):
    out, done = annotated
    assert (done.made, done.there, done.failed) == (COUNT, 0, {})
    source = Scenes("test", num_examples=COUNT, image_size=64)
    folder = make_source(dict(name="folder", data_dir=str(out)))
    regions = make_source(dict(name="region_json", data_dir=str(out / "regions"), images=str(out / "images")))
    assert len(folder) == len(regions) == COUNT
    kinds = dict(zip(map(" ".join, folder.classes.names), folder.classes.isthing, strict=True))
    for k in range(COUNT):
        true, found, told = source[k], folder[k], regions[k]
        assert found["image_id"] == told["image_id"] == true["image_id"]
        assert np.array_equal(found["image"], true["image"]) and np.array_equal(told["image"], true["image"])
        assert (
            found["captions"] == told["captions"] == list(true["captions"]) and told["tags"] == true["tags"]
        )
        of = lambda e, classes: {
            (classes.names[c][0], (e["segments"] == i).tobytes()) for i, c in enumerate(e["class_ids"], 1)
        }
        assert of(found, folder.classes) == of(true, source.classes)
        labels = [source.classes.names[c][0] for c in true["class_ids"]]
        assert all(kinds[label] == thing for label, thing in zip(labels, true["isthing"], strict=True))
        order = [labels.index(tags[0]) for tags in told["region_tags"]]
        assert sorted(order) == list(range(len(labels)))
        np.testing.assert_allclose(told["boxes"], true["boxes"][order])
        assert told["region_captions"] == [list(true["region_captions"][i]) for i in order]


def truth_files(source, categories, folder):
    """COCO's panoptic files of the truth."""
    ids = {c["name"]: c["id"] for c in categories}
    (folder / "truth").mkdir()
    rows = []
    for k in range(len(source)):
        e = source[k]
        labels = [source.classes.names[c][0] for c in e["class_ids"]]
        infos = [
            dict(
                id=i,
                category_id=ids[label],
                iscrowd=0,
                area=int((e["segments"] == i).sum()),
                bbox=[0, 0, 1, 1],
            )
            for i, label in enumerate(labels, 1)
        ]
        rows.append(dict(image_id=e["image_id"], file_name=f"{k}.png", segments_info=infos))
        colours = np.stack([e["segments"], *[np.zeros_like(e["segments"])] * 2], -1).astype(np.uint8)
        Image.fromarray(colours).save(folder / "truth" / f"{k}.png")
    images = [dict(id=r["image_id"], file_name=r["file_name"], height=64, width=64) for r in rows]
    (folder / "truth.json").write_text(
        json.dumps(dict(images=images, annotations=rows, categories=categories))
    )
    return folder / "truth.json"


def test_its_panoptic_files_have_a_quality_of_100(annotated, tmp_path, capsys):
    out, _ = annotated
    categories = json.loads((out / "panoptic.json").read_text())["categories"]
    truth = truth_files(Scenes("test", num_examples=COUNT, image_size=64), categories, tmp_path)
    assert (
        score.main(
            ["panoptic", f"--pred={out / 'panoptic.json'}", f"--gt={truth}", f"--json={tmp_path / 's.json'}"]
        )
        == 0
    )
    found = capsys.readouterr().out
    assert "100.0" in found, found


def test_statistics_and_pictures(annotated):
    out, done = annotated
    source = Scenes("test", num_examples=COUNT, image_size=64)
    examples = [source[k] for k in range(COUNT)]
    found = json.loads((out / "statistics.json").read_text())
    assert found == done.statistics and found["images"] == COUNT and found["failed"] == 0
    assert found["regions"] == sum(len(e["class_ids"]) for e in examples)
    classes = Counter(source.classes.names[c][0] for e in examples for c in e["class_ids"])
    assert found["regions_by_category"] == classes and found["categories"] == len(classes)
    sizes = np.concatenate([(e["boxes"][:, 2:] - e["boxes"][:, :2]).prod(1) for e in examples])
    assert found["region_areas"]["small"] == round(float(((sizes >= 400) & (sizes < 1600)).mean()), 4)
    words = [len(c.split()) for e in examples for c in e["captions"]]
    assert found["caption_words"]["image"]["overall"] == round(float(np.mean(words)), 4)
    assert [area_name(float(a)) for a in (399, 400, 1599.9, 1600, 9999, 10_000, 40_000)] == [
        "tiny", "small", "small", "medium", "medium", "large", "huge",
    ]  # fmt: skip
    for name in ("sheet.png", "worst.png", "statistics.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300


@pytest.mark.parametrize(("kind", "shown"), [("boxes", "test-000000: "), ("tags", "test-000000: ")])
def test_a_sheet_without_masks_shows_boxes_and_tags(tmp_path, monkeypatch, kind, shown):
    drawn = {}
    monkeypatch.setattr(
        outputs, "prediction_grid",
        lambda rows, names, **_: drawn.update({row.caption: row for row in rows}) or Image.new("RGB", (1, 1)),
    )  # fmt: skip
    annotate_source(config(2), {kind: perfect()[kind]}, Rules(), tmp_path)
    example = Scenes("test", num_examples=COUNT, image_size=64)[0]
    shown += ", ".join(example["tags"]) if kind == "tags" else ""
    found = drawn[shown].prediction
    inside = np.zeros((64, 64), bool)
    for x0, y0, x1, y1 in example["boxes"][example["isthing"]].astype(int):
        inside[y0:y1, x0:x1] = kind == "boxes"
    assert np.array_equal(found >= 0, inside)


def scorer(pictures, texts, size=64, seed=0):
    """1 for what is true of the image, else 0: captions, and of a crop by its name the labels."""
    found = []
    for p, own in zip(pictures, texts, strict=True):
        example = scene_plugs.truth(p, size, seed)
        names = scene_plugs.scenes(size, seed)["test"].classes.names
        true = {*example["captions"], *(c for r in example["region_captions"] for c in r)}
        true |= {names[c][0] for c in example["class_ids"]}
        found.append(np.array([float(text in true) for text in own]))
    return found


def test_filters_drop_what_is_wrong(tmp_path):
    plugs = perfect(
        captions=dict(others=0.5), region_captions=dict(others=0.5), boxes=dict(mislabelled=0.5, off=0.1)
    )
    plugs["scores"] = [{"name": f"{__name__}:scorer"}]
    rules = Rules(score_regions=True, caption_quantile=0, region_quantile=0, stability=0)
    before = annotate_source(config(), plugs, rules, tmp_path).statistics
    after = annotate_source(config(), plugs, rules._replace(caption_score=0.5, region_score=0.5), tmp_path)
    assert (after.made, after.there) == (0, COUNT)  # what is kept may change without annotating anew
    assert before["dropped"]["captions"] == before["dropped"]["regions"] == 0
    source = Scenes("test", num_examples=COUNT, image_size=64)
    wrong = 0
    for k in range(COUNT):
        told = json.loads((tmp_path / f"regions/{source[k]['image_id']}.json").read_text())
        labels = {source.classes.names[c][0] for c in source[k]["class_ids"]}
        assert set(told["captions"]) <= set(source[k]["captions"]) and set(told["caption_scores"]) <= {1.0}
        assert {r["label"] for r in told["regions"]} <= labels
        wrong += 2 - len(told["captions"])
    assert after.statistics["dropped"]["captions"] == wrong > 3
    assert after.statistics["dropped"]["regions"] > 3
    half = annotate_source(config(), plugs, rules._replace(caption_quantile=1.0), tmp_path).statistics
    assert half["least_scores"]["captions"] == 1.0


def test_masks_that_are_not_stable_are_dropped(tmp_path):
    """Boxes far from their object make a masker fill the box, which moves as the box does."""
    plugs = {kind: own for kind, own in perfect(boxes=dict(off=0.25)).items() if kind in ("boxes", "masks")}
    found = annotate_source(config(), plugs, Rules(stability=0.9), tmp_path).statistics
    assert found["dropped"]["unstable_masks"] > 3
    assert found["mean_stability"] > 0.9


@pytest.fixture
def faulty():
    """Annotators that fail on some images."""
    module = sys.modules["faulty_annotators"] = ModuleType("faulty_annotators")
    module.calls = Counter()
    module.well = False
    names = lambda k: f"test-{k:06d}"

    def captions(pictures):
        module.calls.update(p.name for p in pictures)
        if not module.well and any(p.name == names(1) for p in pictures):
            raise OSError("the model\nhas no luck")
        said = lambda p: [" "] if p.name == names(3) and not module.well else ["a dog"]
        return [said(p) for p in pictures]

    def boxes(pictures):
        bad = np.array([[0, np.nan, 3, 3]])
        good = np.array([[0.0, 0, 9, 9]])
        return [(bad if p.name == names(5) and not module.well else good, ["dog"], [0.9]) for p in pictures]

    def masks(pictures, boxes):
        size = lambda p: (8, 8) if p.name == names(7) and not module.well else p.pixels.shape[:2]
        return [np.ones((len(b.labels), *size(p)), bool) for p, b in zip(pictures, boxes, strict=True)]

    module.captions, module.boxes, module.masks = captions, boxes, masks
    yield module
    del sys.modules["faulty_annotators"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    source = Scenes("test", num_examples=10, image_size=32)
    for k in range(10):
        Image.fromarray(source[k]["image"]).save(folder / f"{source[k]['image_id']}.jpg")
    (folder / "test-000009.jpg").write_bytes(b"no picture")
    return folder


def flags(photos, out, *more):
    plugs = [f"--{kind}=faulty_annotators:{kind}" for kind in ("captions", "boxes", "masks")]
    return [f"--images={photos}", f"--out={out}", *plugs, "--batch=4", *more]


def test_what_fails_is_listed_and_the_rest_goes_on(faulty, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert command.main(flags(photos, out)) == 1
    assert "5 images annotated, 0 before, 5 failed" in capsys.readouterr().out
    failed = json.loads((out / "failed.json").read_text())
    assert sorted(failed) == [f"test-{k:06d}" for k in (1, 3, 5, 7, 9)]
    for k, text in {
        1: "captions by faulty_annotators:captions: the model has no luck",
        3: "captions by faulty_annotators:captions: expected a text, got ' '",
        5: "boxes by faulty_annotators:boxes: boxes that are not finite numbers",
        7: "masks by faulty_annotators:masks: masks of shape [5, 8, 8], bool, not [5, 32, 32], bool",
        9: "not an image that Pillow can read",
    }.items():
        assert text in failed[f"test-{k:06d}"]
    folder = make_source(dict(name="folder", data_dir=str(out)))
    assert [folder[k]["image_id"] for k in range(5)] == [f"test-{k:06d}" for k in (0, 2, 4, 6, 8)]
    assert os.path.islink(out / "images/test-000000.jpg")
    # The same command tries those again, and only those.
    faulty.well, faulty.calls = True, Counter()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(photos / "test-000009.jpg")
    assert command.main(flags(photos, out)) == 0
    assert "5 images annotated, 5 before, 0 failed" in capsys.readouterr().out
    assert faulty.calls == Counter({name: 1 for name in failed})
    assert names_in(out) == Counter({f"test-{k:06d}": 1 for k in range(10)})
    assert json.loads((out / "failed.json").read_text()) == {}
    # With an image more, that one alone is annotated.
    faulty.calls.clear()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(photos / "another.png")
    assert command.main(flags(photos, out)) == 0 and [*faulty.calls] == ["another"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--box_iou=0.4"], "was made with other rules"),
        (["--tags=faulty_annotators:captions"], "was made with other plugs"),
        (["--stability=2"], "stability=2.0 is outside of 0 to 1"),
        (["--batch=0"], "must have at least 1 image"),
        (["--workers=2"], "are for a --runner"),
    ],
)
def test_what_cannot_go_on(faulty, photos, tmp_path, capsys, more, message):
    faulty.well = True
    (photos / "test-000009.jpg").unlink()
    out = tmp_path / "out"
    assert command.main(flags(photos, out)) == 0
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(photos / "another.png")
    given = [
        flag
        for flag in flags(photos, out)
        if not (more[0].startswith("--batch") and flag.startswith("--batch"))
    ]
    assert command.main([*given, *more]) == 1
    said = capsys.readouterr().err
    assert message in said
    if "was made with" in message:  # Of a long list in the file, the sentence shows a part.
        path = out / "records" / "request.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rules": ["x"] * 1000}))
        assert command.main(given) == 1 and len(capsys.readouterr().err) < 1200


def test_a_plug_that_cannot_be_loaded_does_not_bind_the_folder(faulty, photos, tmp_path, capsys):
    (photos / "test-000009.jpg").unlink()
    faulty.well = True
    wrong = [f"--images={photos}", f"--out={tmp_path / 'out'}", "--captions=faulty_annotators:caption"]
    assert command.main(wrong) == 1
    assert "faulty_annotators:caption" in capsys.readouterr().err
    assert command.main(flags(photos, tmp_path / "out")) == 0
    assert command.main(flags(photos, photos)) == 1
    assert "the outputs would lie among the images" in capsys.readouterr().err


def test_records_of_an_image_that_changed_or_was_damaged(faulty, photos, tmp_path, capsys):
    (photos / "test-000009.jpg").unlink()
    faulty.well, out = True, tmp_path / "out"
    assert command.main(flags(photos, out)) == 0
    path = out / RECORDS / "00000.jsonl"
    lines = path.read_bytes().splitlines(True)
    # A digit of a score changes: that image is annotated anew, not read with another score.
    path.write_bytes(b"".join([lines[0], lines[1].replace(b"0.9", b"0.8", 1), *lines[2:], lines[2]]))
    faulty.calls.clear()
    assert command.main(flags(photos, out)) == 0 and len(faulty.calls) == 1
    assert json.loads((out / "statistics.json").read_text())["images"] == 9
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(photos / "test-000000.jpg")
    capsys.readouterr()
    assert command.main(flags(photos, out)) == 1
    assert (
        "test-000000.jpg is 16 x 32 (height x width), but it was 32 x 32 when it was"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("plugs", "message"),
    [
        ({}, "name at least one plug"),
        ({"masks": [{"name": "sam"}]}, "plugs of masks need one of boxes"),
        (
            {"scores": [{"name": "towers"}], "tags": [{"name": "towers"}]},
            "plugs of scores need one of captions",
        ),
        ({"dances": [{"name": "x"}]}, "'dances' is no kind of plugs"),
    ],
)
def test_plugs_that_do_not_fit_together(plugs, message):
    with pytest.raises(UserError, match=message):
        Annotator(plugs, Rules())


def test_two_detectors_and_two_maskers_vote(tmp_path):
    plugs = perfect()
    plugs["boxes"] += [{"name": "tests.annotation.scene_plugs:boxes", "off": 0.05, "mislabelled": 1.0}]
    plugs["tags"] += [{"name": "tests.annotation.test_workflow:some_tags"}]
    done = annotate_source(config(4), plugs, Rules(tag_votes=2), tmp_path)
    source = Scenes("test", num_examples=4, image_size=64)
    for k in range(4):
        told = json.loads((tmp_path / f"regions/{source[k]['image_id']}.json").read_text())
        assert (
            len(told["regions"]) == source[k]["isthing"].sum()
        )  # each object once, by the first of equal scores
        assert told["tags"] == source[k]["tags"][:1]
    assert done.statistics["dropped"]["unstable_masks"] == 0


def some_tags(pictures):
    return [[scene_plugs.truth(p)["tags"][0], "unicorn"] for p in pictures]


def slow_captions(pictures):
    time.sleep(0.1 * len(pictures))
    return scene_plugs.captions(pictures)


KILLED = """
import sys
from tests.annotation.test_workflow import Rules, Runner, annotate_source, config, slow_plugs
annotate_source(config(30), slow_plugs(), Rules(), sys.argv[1], batch=2, shard_size=7, runner=Runner(*sys.argv[2:3]))
"""


def slow_plugs():
    return {**perfect(), "captions": [{"name": "tests.annotation.test_workflow:slow_captions"}]}


def kill_and_go_on(out, runner):
    """Starts a process, kills it and its children with SIGKILL once it has some records, and goes on in this one."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out), *runner[:1]], cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    until = time.monotonic() + 100
    try:
        while time.monotonic() < until and process.poll() is None:
            if (Path(out) / RECORDS).exists() and sum(names_in(out).values()) >= 5:
                break
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = names_in(out)
    assert 5 <= sum(before.values()) < 30 and not (Path(out) / "statistics.json").exists()
    done = annotate_source(
        config(30), slow_plugs(), Rules(), out, batch=2, shard_size=7, runner=Runner(*runner)
    )
    assert (done.made, done.there) == (30 - len(before), len(before))
    expected = [Scenes("test", num_examples=30, image_size=64)[k]["image_id"] for k in range(30)]
    assert names_in(out) == Counter({name: 1 for name in expected})
    return before


def contents(out):
    skipped = (RECORDS, ".lock")
    files = [p for p in Path(out).rglob("*") if p.is_file() and not any(part in skipped for part in p.parts)]
    found = {str(p.relative_to(out)): p.read_bytes() for p in files}
    return {k: sorted(json.loads(v).items()) if k in ("captions.json", "segments.json") else v for k, v in found.items()
            if k not in ("panoptic.json",)}  # fmt: skip


def test_a_killed_process_goes_on_with_no_image_twice_and_none_lost(tmp_path):
    kill_and_go_on(tmp_path / "killed", ())
    annotate_source(config(30), slow_plugs(), Rules(), tmp_path / "whole", batch=8)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_line_that_was_cut_off_is_made_anew(tmp_path):
    annotate_source(config(4), perfect(), Rules(), tmp_path)
    path = tmp_path / RECORDS / "00000.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    done = annotate_source(config(4), perfect(), Rules(), tmp_path)
    assert (done.made, done.there) == (1, 3) and set(names_in(tmp_path).values()) == {1}


def test_beam_does_the_same_with_several_workers_and_when_killed(tmp_path):
    require("apache_beam")
    kill_and_go_on(tmp_path / "killed", ("direct", 2))
    annotate_source(config(30), slow_plugs(), Rules(), tmp_path / "whole", batch=8)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def deadly_captions(pictures):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_command(tmp_path):
    require("apache_beam")

    def late(*_):
        raise TimeoutError("the command waits for a worker that is gone")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(90)
    try:
        plugs = {"captions": [{"name": "tests.annotation.test_workflow:deadly_captions"}]}
        with pytest.raises(UserError, match="a worker of the direct runner ended with the status 137"):
            annotate_source(config(4), plugs, Rules(), tmp_path, shard_size=2, runner=Runner("direct", 2))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_runner_whose_server_cannot_be_downloaded_is_one_sentence(tmp_path, monkeypatch):
    require("apache_beam")
    from apache_beam.utils.subprocess_server import JavaJarServer

    def local_jar(*_, **__):
        raise RuntimeError("Unable to fetch remote job server jar at https://host/server.jar: no network")

    monkeypatch.setattr(JavaJarServer, "local_jar", local_jar)
    with pytest.raises(
        UserError, match=r"--runner=SparkRunner: .*server.jar: no network; Beam's option --spark_job_"
    ):
        annotate_source(
            config(2), {"captions": perfect()["captions"]}, Rules(), tmp_path, runner=Runner("SparkRunner")
        )


def test_an_error_of_the_whole_work_ends_beam_in_one_sentence(tmp_path):
    require("apache_beam")
    plugs = {"captions": [{"name": "tests.annotation.test_workflow:no_such_function"}]}
    with pytest.raises(UserError, match="cannot be imported"):
        annotate_source(config(4), plugs, Rules(), tmp_path, runner=Runner("direct", 1))


def test_a_stage_annotates_for_the_run_after_it(tmp_path):
    source = {"name": "scenes", "split": "test", "num_examples": 4, "image_size": 64}
    labels = dict(source=source, plugs=perfect(), rules=dict(stuff_regions=True), batch_size=2)
    stage = dict(name="labels", kind="annotate", config=labels)
    train = dict(name="folder", data_dir="stage:labels")
    config = ConfigDict(dict(method="toy", data=dict(train=[train]), stages=[stage]))
    workdir = epath.Path(tmp_path)
    check_finished(config, workdir)
    assert run_stages(config, workdir, lambda config, folder: {})
    read = make_source(resolved(config, workdir).data.train[0])
    assert len(read) == 4 and read.provides >= {"segments", "captions"}
    with pytest.raises(UserError, match="rules has no key 'dance'"):
        annotate_stage(epath.Path(tmp_path / "x"), source=source, plugs=perfect(), rules={"dance": 1})
    with pytest.raises(UserError, match="none of the 4 images"):
        bad = {"captions": ["tests.annotation.test_workflow:no_captions"]}
        annotate_stage(epath.Path(tmp_path / "y"), source=source, plugs=bad)


def no_captions(pictures):
    raise ValueError("no")
