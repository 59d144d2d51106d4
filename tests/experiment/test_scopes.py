"""Stages by themselves: their names, their order, their markers. A run is what `Recorder` says it is."""

import json

import pytest
from ml_collections import ConfigDict

from ovseg_jax.config import needed, resolved, stages_of
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.changes import config_differences
from ovseg_jax.experiment.stages import check_finished, run_stages
from ovseg_jax.train.checkpoints import write_config


def stage(name, kind="train", **config):
    return dict(name=name, kind=kind, config=dict(method="toy", steps=2, **config))


class Recorder:
    """Runs stages as `experiment.run.train` does, and remembers what they resolved to; stops in front of one."""

    def __init__(self, stop=""):
        self.seen, self.stop = {}, stop

    def __call__(self, config, folder):
        if folder.name == self.stop:
            return {"stopped": True}
        check_finished(config, folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config)
        if not run_stages(config, folder, self):
            return {"stopped": True}
        self.seen["/".join(folder.parts[-2:])] = resolved(config, folder).get("init", "")
        return {}


def run(workdir, *stages, recorder=None, **config):
    recorder = recorder or Recorder()
    recorder(ConfigDict(dict(method="toy", stages=list(stages), **config)), workdir)
    return recorder.seen


@pytest.fixture
def workdir(tmp_path):
    from etils import epath

    return epath.Path(tmp_path) / "run"


def test_they_run_in_the_order_of_their_needs(workdir):
    seen = run(workdir, stage("c", init="stage:b"), stage("a"), stage("b", init="stage:a/towers"))
    assert list(seen) == ["run/a", "run/b", "run/c", f"{workdir.parent.name}/run"]
    assert seen["run/b"] == str(workdir / "a" / "towers")


def test_a_name_is_looked_for_in_its_own_scope_first_then_outward(workdir):
    inner = [stage("clip"), stage("deep", init="stage:clip"), stage("wide", init="stage:other")]
    seen = run(
        workdir, stage("clip"), stage("x", stages=inner, init="stage:clip"), stage("other"), init="stage:clip"
    )
    assert seen["x/deep"] == seen["run/x"] == str(workdir / "x" / "clip")
    assert seen["x/wide"] == str(workdir / "other")
    assert seen[f"{workdir.parent.name}/run"] == str(workdir / "clip")
    assert list(seen).index("run/other") < list(seen).index(
        "x/wide"
    )  # Needed within, it comes before the whole.
    # A folder that was moved, and one that is named otherwise, resolve anew.
    moved = workdir.parent / "moved"
    workdir.rename(moved)
    config = ConfigDict(json.loads((moved / "x" / "wide" / "config.json").read_text()))
    assert resolved(config, moved / "x" / "wide").init == str(moved / "other")


def test_what_is_needed():
    config = ConfigDict(
        dict(a="stage:x/file", stages=[stage("y", init="stage:z"), stage("v", init="stage:y")], b="stage:y")
    )
    assert needed(config) == {"x", "z"}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([stage("a", init="stage:b"), stage("b", init="stage:a")], "a, b depend on each other"),
        ([stage("a", init="stage:a")], "depend on each other, or on themselves"),
        ([stage("a"), stage("a")], "the name 'a' is used twice, or has other"),
        ([stage("a/b")], "the name 'a/b' is used twice, or has other"),
        ([stage("")], "the name '' is used twice, or has other"),
        (
            [stage("a", kind="dance")],
            "a has the kind 'dance'; known kinds: train, pseudo_label, pseudo_label_maps, cluster, annotate",
        ),
        ([dict(name="a")], r"each stage is dict\(name=\.\.\., kind=\.\.\., config=\.\.\.\)"),
        ([stage("a", init="stage:b")], "stage:b: there is no stage 'b'; known stages: a"),
        (["a"], "each stage is dict"),
    ],
)
def test_stages_that_cannot_be(workdir, stages, message):
    with pytest.raises(UserError, match=message):
        run(workdir, *stages)


def test_a_finished_stage_is_skipped_and_one_whose_config_changed_is_refused(workdir):
    inner = stage("deep", rate=1)
    run(workdir, stage("a", rate=1, log_every=5, stages=[inner]), stage("b"))
    assert list(run(workdir, stage("a", rate=1.0, log_every=7, stages=[inner]), stage("b"))) == [
        f"{workdir.parent.name}/run"
    ]
    before = {path: path.read_bytes() for path in (workdir / "config.json", workdir / "a" / "stage.json")}
    for changed, message in (
        (stage("a", rate=2, stages=[inner]), "the stage a in .*run/a was finished.*: .*rate was 1, is 2"),
        (stage("a", rate=1, stages=[stage("deep", rate=3)]), r"deep\.rate was 1, is 3"),
        (stage("a", rate=1), "its stages were deep, are none"),
        (stage("a", rate=1, stages=[inner]) | {"kind": "pseudo_label"}, "kind was train, is pseudo_label"),
    ):
        with pytest.raises(UserError, match=message):
            run(workdir, changed, stage("b"))
    longer = stage("a", rate=1, stages=[inner])
    longer["config"]["steps"] = 3
    with pytest.raises(UserError, match="steps was 2, is 3"):
        run(workdir, longer, stage("b"))
    assert before == {path: path.read_bytes() for path in before}
    (workdir / "a" / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"stage\.json does not match its checksum"):
        run(workdir, stage("a"), stage("b"))


def test_a_run_that_was_stopped_goes_on_with_the_stage_it_was_in(workdir):
    stages = [stage("a"), stage("b", init="stage:a"), stage("c", init="stage:b")]
    assert list(run(workdir, *stages, recorder=Recorder(stop="b"))) == ["run/a"]
    assert list(run(workdir, *stages)) == ["run/b", "run/c", f"{workdir.parent.name}/run"]


@pytest.mark.parametrize(
    ("before", "now"), [(500, 1000), (60_000, 180_000), (5500, 11_000), (5500, 5500), (9, 10), (2.0, 3)]
)
def test_steps_may_grow_and_not_shrink(before, now):
    config = lambda steps: ConfigDict({"steps": steps, "rate": 1})
    assert config_differences(config(before), config(now)) == []
    if now > before:
        assert config_differences(config(now), config(before)) == [f"steps was {now}, is {before}"]


def test_numbers_are_compared_as_numbers():
    config = lambda value: ConfigDict({"a": {"b": [value]}})
    assert config_differences(config(1), config(1.0)) == []
    for old, new in ((1, "1"), (1, True), (0, None), (10, 9), ("a", "b"), (0, False)):
        assert len(config_differences(config(old), config(new))) == 1
    assert config_differences(config(1), ConfigDict({})) == ["a.b.0 was 1, is absent"]


def test_stages_are_read_from_json_and_from_configs():
    config = ConfigDict({"stages": [dict(name="a", kind="train", config=ConfigDict({"x": [{"y": (1, 2)}]}))]})
    assert stages_of(config)["a"].config.to_dict() == {"x": [{"y": [1, 2]}]}
    assert stages_of(ConfigDict({})) == {}
