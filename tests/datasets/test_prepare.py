"""Prepared data sets: what is written is what the reader says, whole, resumable, and readable without TensorFlow."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from ovseg_jax import prepare as command
from ovseg_jax.data.images import Encoded, read_image
from ovseg_jax.data.mixture import Mixture
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.sources.prepared import Prepared
from ovseg_jax.datasets import prepare as prepare_module
from ovseg_jax.datasets.prepare import prepare
from ovseg_jax.errors import UserError
from tests.datasets.toy import Toy, example
from tests.extras import require

ROOT = Path(__file__).parents[2]
TOY = "tests.datasets.toy:Toy"


@pytest.fixture(autouse=True)
def packages():
    require("apache_beam")
    require("tensorflow_datasets")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "toy.json").write_text(json.dumps({"train": 11, "val": 4}))
    return folder


def run(toy, out, **arguments):
    return prepare(toy, out, **{"shard_examples": 4, "workers": 1, **arguments})


@pytest.mark.parametrize("options", [{}, {"texts": "no", "wide": "yes"}], ids=["all fields", "16 bits"])
def test_what_is_read_is_what_the_reader_says(tmp_path, source, options):
    toy = Toy(source, **options)
    manifest = run(toy, tmp_path / "out")
    assert [manifest["splits"][s]["examples"] for s in ("train", "val")] == [11, 4]
    assert [len(manifest["splits"][s]["shards"]) for s in ("train", "val")] == [3, 1]
    assert [manifest["splits"][s]["notes"] for s in ("train", "val")] == [["11 pictures"], ["4 pictures"]]
    assert manifest["options"] == toy.chosen and manifest["licence"] == "CC0"
    for split, count in (("train", 11), ("val", 4)):
        prepared = make_source(
            {"name": "prepared", "data_dir": str(tmp_path / "out"), "split": split, "verify": True}
        )
        assert len(prepared) == count and prepared.classes == toy.classes and prepared.name == "toy"
        assert prepared.provides == toy.provides | {"boxes"}
        for k in range(count):
            expected, found = example(toy, split, k), prepared[k]
            assert found["image_id"] == f"{split} {k}"
            assert np.array_equal(found["image"], read_image(Encoded("", expected["image"])))
            assert found["segments"].dtype == np.int32 and np.array_equal(
                found["segments"], expected["segments"]
            )
            assert found["class_ids"].tolist() == list(range(-1, k % 3 - 1))
            assert found["isthing"].tolist() == [True, True][: k % 3]  # unlabelled, dog
            assert not found["iscrowd"].any() and len(found["iscrowd"]) == k % 3
            # The first segment keeps its left column where the second, one to the right, covers it.
            edges = [[row, 2 * row, row + 4, 2 * row + 3] for row in range(k % 3)]
            assert found["boxes"].tolist() == edges
            for field in prepared.provides & {"captions", "tags", "region_captions", "region_tags"}:
                assert found[field] == expected[field], field
            assert found["label"] == prepared.labels[k] == k % 3
        # What comes from the index is what comes from the examples.
        for own, base in ((Prepared.regions, super(Prepared, prepared).regions),):
            for column, other in zip(own(prepared), base(), strict=True):
                assert np.array_equal(column, other) and column.dtype == other.dtype
        assert prepared.extent() == super(Prepared, prepared).extent()
        for field in ("captions", "tags", "region_captions", "region_tags"):
            assert list(prepared.texts(field)) == list(super(Prepared, prepared).texts(field))
        assert (prepared.provides >= {"captions"}) == bool(list(prepared.captions()))


def test_tensorflow_datasets_reads_it_without_our_code(tmp_path, source):
    run(Toy(source), tmp_path / "out")
    code = """
import sys, tensorflow_datasets as tfds
builder = tfds.builder_from_directory(sys.argv[1])
val = builder.as_data_source("val")
row = val[2]
assert len(val) == 4 and len(builder.as_data_source("train[2:5]")) == 3
assert row["image"].shape == (9, 9, 3) and row["segments"].shape == (9, 9, 1) and row["segments"].max() == 2
assert builder.info.features["class_ids"].feature.names == ["dog", "sky (3)", "sky (9)"]
assert list(row["class_ids"]) == [-1, 0] and list(row["region_tags_count"]) == [1, 2]
assert builder.info.version == "1.0.0" and builder.info.redistribution_info.license == "CC0"
assert "tensorflow" not in sys.modules and "ovseg_jax" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_the_manifest_holds_the_checksums_of_the_files(tmp_path, source):
    out = tmp_path / "out"
    manifest = run(Toy(source), out)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    files = [f for entry in manifest["splits"].values() for f in [*entry["shards"], entry["index"]]]
    for file in files:
        content = (out / file["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
    named = {file["file"] for file in files} | {"manifest.json", "classes.json"}
    left = {path.name for path in out.iterdir()} - named
    assert {"dataset_info.json", "features.json"} <= left and not {n for n in left if n.startswith(".work")}


def stamps(out):
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir() if ".array_record" in path.name}


def test_a_split_is_added_and_a_finished_one_is_left_alone(tmp_path, source, capsys):
    out = tmp_path / "out"
    given = [TOY, f"--source={source}", f"--out={out}", "--workers=1", "--shard_examples=4"]
    assert command.main([*given, "--split=val"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("val: 4 examples, 1 files, ")
    first = stamps(out)
    with pytest.raises(UserError, match="has no split 'train': it holds val of toy"):
        Prepared(out, "train")
    assert command.main(given) == 0
    second = stamps(out)
    assert {name: second[name] for name in first} == first and len(second) == 4
    assert len(Prepared(out, "train")) == 11 and len(Prepared(out, "val")) == 4
    assert command.main(given) == 0 and stamps(out) == second


def test_a_damaged_example_keeps_the_other_shards(tmp_path, source):
    out = tmp_path / "out"
    (source / "broken").touch()
    with pytest.raises(UserError, match="the picture 5 is broken; the other shards are kept"):
        run(Toy(source), out, splits=["train"])
    first = stamps(out)
    assert len(first) == 2
    with pytest.raises(UserError, match=r"has no manifest\.json: it is not a folder that .* has finished"):
        Prepared(out)
    (source / "broken").unlink()
    run(Toy(source), out, splits=["train"])
    second = stamps(out)
    assert len(second) == 3 and {name: second[name] for name in first} == first


def wait_for_shards(process, out, count):
    while len(list(out.glob(".work/train/?????.json"))) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def content(folder):
    """The bytes of all files of a folder, with those in folders of its own and hidden ones."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("whom", ["all", "main"])
def test_a_killed_run_continues(tmp_path, source, whom):
    """Killed with its workers or without, it leaves whole shards, which the next call does not write again."""
    out = tmp_path / "out"
    (source / "toy.json").write_text(json.dumps({"train": 120, "val": 1}))
    given = [TOY, f"--source={source}", f"--out={out}", "--workers=2", "--shard_examples=2", "--split=train"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ovseg_jax.prepare", *given],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    wait_for_shards(process, out, 3)
    if whom == "all":
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    else:
        process.kill()
        process.wait()
    marks = {path.name[:5] for path in out.glob(".work/train/?????.json")}
    assert len(marks) < 60, "it was killed too late to show anything"
    before = {name: at for name, at in stamps(out).items() if name.split("-")[2] in marks}
    assert len(before) == len(marks)
    run(Toy(source), out, splits=["train"], shard_examples=2)
    assert {name: at for name, at in stamps(out).items() if name in before} == before
    run(Toy(source), tmp_path / "whole", splits=["train"], shard_examples=2)
    assert content(out) == content(tmp_path / "whole") and len(Prepared(out, verify=True)) == 120


def test_a_shard_that_two_workers_write_at_once(tmp_path, source, monkeypatch):
    """The second begins while the first one's mark is written."""
    path, begun, job = type(epath.Path(tmp_path)), [], []
    write = path.write_bytes

    def interrupted(self, data):
        write(self, data)
        if re.match(r"\d{5}\.json", self.name) and not begun:
            begun.append(self.name)
            prepare_module.write_shard(int(self.name[:5]), *job)

    def direct(function, shards, options, runner, *more):
        job[:] = more
        for k in shards:
            function(k, *more)

    monkeypatch.setattr(path, "write_bytes", interrupted)
    monkeypatch.setattr(prepare_module, "run_elements", direct)
    run(Toy(source), tmp_path / "out")
    assert begun and len(Prepared(tmp_path / "out", split="train", verify=True)) == 11


KILLED = """
import os, sys
from pathlib import Path
import array_record.python.array_record_module, tensorflow_datasets
from ovseg_jax.datasets import prepare as module
from tests.datasets.toy import Toy

module.pipeline_options("direct", 1, ())  # imports Beam
source, root = map(Path, sys.argv[1:])
module.run_elements = lambda write, shards, options, runner, path, begun: [write(k, path, 0) for k in shards]


def call(out, stop):
    # Runs in a child, which dies before the operation `stop` on a file below `out`; returns whether it did not.
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    left = [stop]

    def hook(event, arguments):
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
        if changes or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")):
            if str(arguments[0]).startswith((str(out), ".work")):
                left[0] -= 1
                if not left[0]:
                    os._exit(9)

    sys.addaudithook(hook)
    module.prepare(Toy(source), out, shard_examples=4, workers=1)
    os._exit(0)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


assert call(root / "whole", 0)
expected, stop = content(root / "whole"), 1
while not call(out := root / str(stop), stop):
    assert call(out, 0), stop
    found = content(out)
    assert not (wrong := [name for name in found | expected if found.get(name) != expected.get(name)]), (stop, wrong)
    stop += 1
print(stop)
"""


def test_killed_before_any_operation_on_a_file_it_continues_with_the_same_bytes(tmp_path, source):
    (source / "toy.json").write_text(json.dumps({"train": 5, "val": 1}))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, source, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 40


@pytest.mark.parametrize("options", [["--runner=BundleBasedDirectRunner"], ["--workers=3"]])
def test_runners_and_numbers_of_workers_write_the_same_bytes(tmp_path, source, options):
    given = [TOY, f"--source={source}", "--shard_examples=4"]
    assert command.main([*given, f"--out={tmp_path / 'a'}", *options]) == 0
    assert command.main([*given, f"--out={tmp_path / 'b'}", "--workers=1"]) == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_job_server_runs_it(tmp_path, source):
    """As Flink and Spark do, whose runners speak the protocol of this server."""
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main"),
            *("-p", "0", "--port_file", tmp_path / "port"),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (tmp_path / "port").exists() or not (tmp_path / "port").read_text():
            assert server.poll() is None
            time.sleep(0.1)
        port = (tmp_path / "port").read_text().strip()
        given = [TOY, f"--source={source}", "--shard_examples=4", "--split=train"]
        own = [f"--beam=--job_endpoint=localhost:{port}", "--beam=--environment_type=LOOPBACK"]
        assert command.main([*given, f"--out={tmp_path / 'a'}", "--runner=PortableRunner", *own]) == 0
    finally:
        server.terminate()
        server.wait()
    assert command.main([*given, f"--out={tmp_path / 'b'}", "--workers=1"]) == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_damaged_file_of_an_unfinished_run_is_written_again_or_named(tmp_path, source):
    (source / "broken").touch()
    with pytest.raises(UserError, match="is broken"):
        run(Toy(source), tmp_path / "begun")
    (source / "broken").unlink()
    run(Toy(source), tmp_path / "whole")
    begun = sorted(path for path in content(tmp_path / "begun") if not path.endswith((".error", ".pickle")))
    assert {"plan.json", "00000.json", "00000.npz", "00001.entries"} <= {Path(path).name for path in begun}
    said = []
    for k, name in enumerate(begun):
        for j, change in enumerate((lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"[1]", None)):
            out = tmp_path / f"{k}-{j}"
            shutil.copytree(tmp_path / "begun", out)
            if change is None:
                (out / name).unlink()
            else:
                (out / name).write_bytes(change((out / name).read_bytes()))
            try:
                run(Toy(source), out)
            except UserError as error:
                assert (Path(name).name in str(error) or "request.json" in name) and str(out) in str(error)
                assert "\n" not in str(error)
                said.append(Path(name).name)
                continue
            assert content(out) == content(tmp_path / "whole"), (name, j)
    # A finished shard is written again; lists of what to write are not guessed.
    assert set(said) <= {"plan.json", "request.json", "00001.entries"} and len(set(said)) == 3


def test_another_data_set_or_option_in_the_folder_is_refused(tmp_path, source):
    out = tmp_path / "out"
    run(Toy(source), out, splits=["val"])
    with pytest.raises(UserError, match=r'holds \{"dataset": "toy".*"texts": "yes".*choose another --out'):
        run(Toy(source, texts="no"), out, splits=["val"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").touch()
    with pytest.raises(UserError, match=r"holds letter\.txt, which prepare has not written"):
        run(Toy(source), other)


def test_a_source_that_changes_between_two_calls_is_refused(tmp_path, source):
    (source / "broken").touch()
    with pytest.raises(UserError, match="is broken"):
        run(Toy(source), tmp_path / "out")
    (source / "toy.json").write_text(json.dumps({"train": 11, "val": 40}))
    with pytest.raises(UserError, match="have changed since"):
        run(Toy(source), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image=b"\xff\xd8\xff"), "the image of toy, example train 0 cannot be read"),
        (
            dict(segments=np.zeros((3, 3), np.int32)),
            r"its segments are \(3, 3\) but the upright image is \(12, 16\)",
        ),
        (dict(segments=np.full((12, 16), 3, np.int32)), r"its segments have values outside 0\.\.0"),
        (dict(class_ids=[3]), r"class_ids has a value outside -1\.\.2"),
        (dict(boxes=[[0, 0, 1, 1]]), "boxes has 1 rows for 0 segments"),
        (dict(boxes=np.full((1, 4), np.nan), class_ids=[0]), "a box is not finite"),
        (dict(label=3), "the label 3 is none of its 3 classes"),
        (dict(captions="a dog"), "captions: expected a list of texts"),
        (dict(region_tags=[["a"]]), "region_tags has 1 lists for 0 segments"),
        (dict(feature=np.zeros(3)), "the reader returns 'feature', which it does not provide"),
        (
            dict(class_ids=np.zeros(300, np.int32), region_tags=[[]] * 300, region_captions=[[]] * 300),
            "it has 300 segments: set `wide`",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_example_that_does_not_fit_is_refused(source, change, message):
    from ovseg_jax.datasets.fields import complete

    toy = Toy(source)
    with pytest.raises(UserError, match=message):
        complete(toy, "train 0", example(toy, "train", 0) | change)


def damage(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 0xFF
    path.write_bytes(content)


def test_a_damaged_or_foreign_folder_is_one_sentence(tmp_path, source):
    out = tmp_path / "out"
    run(Toy(source), out, splits=["val"])
    shard = out / "toy-val.array_record-00000-of-00001"
    whole = shard.read_bytes()
    damage(shard)
    with pytest.raises(
        UserError, match=r"00000-of-00001 does not have the checksum of manifest\.json: copy it again"
    ):
        Prepared(out, "val", verify=True)
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"has {len(whole) - 1} bytes in place of {len(whole)}"):
        Prepared(out, "val")
    shard.unlink()
    with pytest.raises(UserError, match="00000-of-00001 is missing"):
        Prepared(out, "val")
    shard.write_bytes(whole)
    for foreign in (tmp_path, tmp_path / "absent", ""):
        with pytest.raises(UserError, match=r"has no manifest\.json"):
            Prepared(foreign)


def test_damaged_records_are_read_or_refused(tmp_path, source):
    """Their size is as it was, so that only the records' own checksums can tell."""
    out = tmp_path / "out"
    run(Toy(source), out, splits=["val"])
    shard = out / "toy-val.array_record-00000-of-00001"
    whole, refused = shard.read_bytes(), 0
    used = len(whole.rstrip(b"\0")) // 8  # the rest is mostly padding
    for k in range(60):
        rng = np.random.default_rng(k)
        shard.write_bytes(whole)
        for at in rng.integers(0, used if k % 4 else len(whole), 1 + k % 7):
            damage(shard, at)
        try:
            for example in map(Prepared(out, "val").__getitem__, range(4)):
                dict(example)
        except UserError as error:
            assert str(out) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_a_record_is_not_decoded_for_other_fields(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    run(Toy(source), out, splits=["val"])
    prepared = Prepared(out, "val")
    from ovseg_jax.data.sources import prepared as module

    monkeypatch.setattr(module, "read_mask", lambda _: pytest.fail("a mask was decoded"))
    assert prepared[1]["captions"] == ["caption 1"] and prepared[1]["image"].shape == (20, 8, 3)
    monkeypatch.setattr(module, "read_oriented", lambda _: pytest.fail("an image was decoded"))
    assert list(prepared.captions()) and prepared[2]["boxes"].shape == (2, 4)


def test_prepared_sets_mix_with_their_classes_united(tmp_path, source):
    out = tmp_path / "out"
    run(Toy(source), out)
    (tmp_path / "labels.txt").write_text("7:cat\n3:sky\n9:cloud\n")
    part = {"name": "prepared", "data_dir": str(out)}
    mixture = make_source(
        [{**part, "weight": 2.0}, {**part, "split": "val", "labels": str(tmp_path / "labels.txt")}]
    )
    assert isinstance(mixture, Mixture) and mixture.weights == [2.0, 1.0] and len(mixture) == 15
    assert [names[0] for names in mixture.classes.names] == ["dog", "sky", "cat", "cloud"]
    assert mixture[11 + 2]["class_ids"].tolist() == [-1, 2]  # a cat of the second set


def test_a_run_trains_from_prepared_files(tmp_path, source):
    from ovseg_jax.configs import openseg
    from ovseg_jax.experiment.run import train

    out = tmp_path / "out"
    run(Toy(source), out)
    config = openseg.get_config(f"data=prepared,data_dir={out};{out},val_dir={out},size=tiny")
    config.update(dict(steps=2, batch_size=8, log_every=1))
    config.data.update(image_size=32, max_masks=4)
    config.loss.group = 8
    config.model.update(width=16, num_queries=4)
    config.model.backbone.width = 16
    summary = train(config, tmp_path / "run")
    assert summary["steps"] == 2 and 0 <= summary["validation/miou"] <= 1, summary


def test_the_number_of_classes_may_be_required(tmp_path, source):
    run(Toy(source), tmp_path / "out", splits=["val"])
    assert len(Prepared(tmp_path / "out", "val", num_classes=3).classes) == 3
    with pytest.raises(UserError, match=r"toy with 3 classes, but num_classes=9 .*: classes=3"):
        Prepared(tmp_path / "out", "val", num_classes=9)


def test_it_can_be_pickled_to_workers(tmp_path, source):
    import pickle

    run(Toy(source), tmp_path / "out", splits=["val"])
    prepared = Prepared(tmp_path / "out", "val")
    first = prepared[1]["image"]
    assert np.array_equal(pickle.loads(pickle.dumps(prepared))[1]["image"], first)


def test_mistakes_on_the_command_line_are_one_sentence(tmp_path, source, capsys):
    given = [TOY, f"--source={source}", f"--out={tmp_path / 'out'}"]
    for arguments, message in (
        ([], "name a data set"),
        ([TOY], "name --source=DIR"),
        ([*given, "--option=texts"], "--option=texts is not of the form NAME=VALUE"),
        ([*given, "--option=texts=no", "--option=texts=yes"], "an --option is given twice"),
        ([*given, "--split=test"], "toy has no split 'test'; its splits are train, val"),
        ([*given, "--split=val", "--split=val"], "the split 'val' is named twice"),
        ([*given, "--shard_examples=0"], "--shard_examples must be at least 1"),
        ([*given, "--beam=--projekt=x"], "Beam has no option --projekt"),
        ([*given, "--runner=NoRunner"], "--runner=NoRunner"),
        ([*given, "--runner=SparkRunner", "--workers=2"], "--workers is for the direct runner"),
    ):
        assert command.main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_the_list_says_where_files_come_from(capsys):
    assert command.main([TOY, "--list"]) == 0
    out = capsys.readouterr().out
    for line in (
        "licence: CC0",
        "  toy.json",
        "splits: train, val",
        "--option=texts=yes|no: whether there are texts",
    ):
        assert line in out.splitlines()
