"""Sums and counts, and the file that they go to."""

import io
import json
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.train import metrics
from ovseg_jax.train.metrics import MetricWriter, read_metrics, series
from ovseg_jax.train.progress import Progress, clock
from tests.extras import require


def test_one_division_at_the_end():
    one = metrics.to_host({"a": (jnp.array(1.0), jnp.array(1.0)), "b": (jnp.array(0.0), jnp.array(0.0))})
    two = metrics.to_host({"a": (jnp.array(9.0), jnp.array(3.0)), "c": (jnp.array(5.0), jnp.array(2.0))})
    assert metrics.means(metrics.add(one, two)) == {"a": 2.5, "c": 2.5}


def test_the_cause_is_named_before_what_follows_from_it():
    nan = float("nan")
    sums = {"grad_norm": (nan, 1.0), "loss": (nan, 1.0), "mask_loss": (float("inf"), 1.0), "zero": (0.0, 0.0)}
    assert metrics.not_finite(sums) == ["mask_loss", "loss", "grad_norm"]


def test_a_number_that_json_has_no_word_for_is_null(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.scalars(3, {"a": 1.5, "b": float("nan")})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 3, "a": 1.5, "b": None} and line.endswith("\n")
    assert series(writer.records, "b") == ([], [])
    assert writer.has(3, "a") and not writer.has(2, "a") and not writer.has(3, "c")


def test_a_resumed_writer_drops_what_it_will_write_again(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in (2, 4, 6):
        writer.scalars(step, {"loss": step / 2})
    again = MetricWriter(tmp_path, step=4)
    again.scalars(6, {"loss": 30.0})
    assert read_metrics(tmp_path) == again.records
    assert series(again.records, "loss") == ([2, 4, 6], [1.0, 2.0, 30.0])


def test_a_broken_line_is_named_unless_it_is_the_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"')
    assert read_metrics(tmp_path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"stop": 2}\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    MetricWriter(tmp_path, write=False).scalars(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_plain_lines_where_there_is_no_terminal():
    file = io.StringIO()
    progress = Progress(10, 4, every=0.0, file=file)
    progress.update(5, 1.25, 80.0)
    progress.close()
    line = file.getvalue()
    assert line.startswith("step 5/10, loss 1.250, 80.0 images/s, ") and line.endswith(" left\n")


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    progress = Progress(10, 4, file=file)
    progress.update(5, 1.25, 80.0)
    progress.say("hello")
    progress.update(10, 0.5, 80.0)
    progress.close()
    assert "10/10" in file.getvalue() and "loss 0.500, 80.0 images/s" in file.getvalue()
    assert "hello\n" in file.getvalue()


def test_clock():
    assert [clock(s) for s in (0, 59.6, 61, 3600 + 62)] == ["0:00", "1:00", "1:01", "1:01:02"]


class FakeWandb:
    """What `_Wandb` uses of the package, which keeps it."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **given):
        if given["project"] == "nobody":
            raise RuntimeError("api_key not configured\nlong explanation")
        self.started.append(given)
        log = lambda values: self.logged.append(values)
        return SimpleNamespace(define_metric=self.define_metric, log=log, finish=self.finish)

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_the_records_of_a_resumed_run_under_one_name(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 4):
        writer = MetricWriter(tmp_path, step=start, wandb="mine", config={"seed": 3})
        writer.scalars(start + 2, {"loss": 1.5, "bad": float("nan")})
        writer.close()
    first, second = fake.started
    assert first == second and first["config"] == {"seed": 3} and first["dir"] == str(tmp_path)
    assert (first["project"], first["name"], first["resume"]) == ("mine", tmp_path.name, "allow")
    assert fake.logged == [{"step": 2, "loss": 1.5}, {"step": 6, "loss": 1.5}] and fake.finished == 2
    (tmp_path / "other").mkdir()
    MetricWriter(tmp_path / "other", wandb="mine")
    assert fake.started[-1]["id"] != first["id"]
    MetricWriter(tmp_path / "none", wandb="mine", write=False)
    MetricWriter(tmp_path / "none")
    assert len(fake.started) == 3


def test_tensorboard_reads_what_was_written(tmp_path):
    """Where TensorFlow is installed, which CI does without: its event files hold the records."""
    pytest.importorskip("tensorflow")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    writer = MetricWriter(tmp_path, tensorboard=True)
    for step in (2, 4):
        writer.scalars(step, {"train/loss": step / 8, "bad": float("nan")})
    writer.close()
    MetricWriter(tmp_path / "other", tensorboard=True, write=False)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    read = [(event.step, float(make_ndarray(event.tensor_proto))) for event in found.Tensors("train/loss")]
    assert read == [(2, 0.25), (4, 0.5)] and "bad" not in found.Tags()["tensors"]
    assert not (tmp_path / "other").exists()


def test_tensorboard_without_tensorflow_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"tensorboard=True needs TensorFlow: pip install -e '\.\[tensorboard\]'"
    ):
        MetricWriter(tmp_path, tensorboard=True)


def test_weights_and_biases_that_is_not_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb=mine needs Weights & Biases: pip install -e '\.\[wandb\]'"):
        MetricWriter(tmp_path, wandb="mine")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    with pytest.raises(UserError, match=r"did not start \(api_key not configured\); WANDB_MODE=offline"):
        MetricWriter(tmp_path, wandb="nobody")


def test_weights_and_biases_itself_takes_the_records(tmp_path, monkeypatch):
    require("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = MetricWriter(tmp_path, wandb="mine", config={"seed": 3, "model": {"width": 16}})
    writer.scalars(2, {"loss": 1.5, "validation/miou": 12.0})
    writer.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # Its own process may write the file a moment after the run has ended.
    end = time.monotonic() + 30
    while b"validation/miou" not in (content := file.read_bytes()) and time.monotonic() < end:
        time.sleep(0.05)
    assert b"validation/miou" in content and (tmp_path / "wandb.id").read_text().encode() in content
