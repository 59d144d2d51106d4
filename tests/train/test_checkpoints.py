"""Damaged, incomplete and foreign things among the checkpoints of a run."""

import os
import shutil

import jax
import numpy as np
import pytest
from fakes import LinearMethod, make_batches, make_config

from ovseg_jax.errors import UserError
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.train.checkpoints import load_variables, read_config, write_config
from ovseg_jax.train.loop import fit


def train(workdir, steps=10):
    config = make_config(steps=steps, optimizer=dict(make_config().optimizer, schedule="constant"))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    return fit(config, workdir, LinearMethod(), make_batches(config), [], mesh)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(workdir)
    write_config(workdir, make_config(steps=10))
    return workdir


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def largest(folder):
    return max(
        (p for p in folder.rglob("*") if p.is_file() and "/d/" in str(p)), key=lambda p: p.stat().st_size
    )


def flip(path, bit=12345):
    data = bytearray(path.read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


DAMAGES = {
    "missing": lambda step: largest(step / "variables").unlink(),
    "cut": lambda step: os.truncate(largest(step / "variables"), 100),
    "empty": lambda step: os.truncate(largest(step / "variables"), 0),
    "altered": lambda step: flip(largest(step / "variables")),
    "no manifest": lambda step: (step / "variables" / "manifest.ocdbt").unlink(),
    "no process": lambda step: shutil.rmtree(step / "variables" / "ocdbt.process_0"),
    "no metadata": lambda step: (step / "variables" / "_METADATA").unlink(),
    "empty metadata": lambda step: os.truncate(step / "variables" / "_METADATA", 0),
    "no variables": lambda step: shutil.rmtree(step / "variables"),
    "no sums": lambda step: (step / "checksums.json").unlink(),
    "cut sums": lambda step: os.truncate(step / "checksums.json", 100),
    "odd sums": lambda step: (step / "checksums.json").write_text('{"variables/a": 3}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_used_and_this_is_said(copy, damage, caplog):
    DAMAGES[damage](copy / "checkpoints" / "10")
    assert load_variables(copy)[1] == 5
    (message,) = caplog.messages
    assert "checkpoints/10 is damaged" in message and message.endswith("step 5 is used instead")
    with pytest.raises(UserError, match="checkpoints/10 is damaged"):
        load_variables(copy, 10)
    DAMAGES[damage](copy / "checkpoints" / "5")
    with pytest.raises(UserError, match=r"no undamaged checkpoint: .*/10 is damaged.*/5 is damaged"):
        load_variables(copy)


def test_no_flipped_bit_loads(copy):
    step = copy / "checkpoints" / "10"
    for path in [p for p in (step / "variables").rglob("*") if p.is_file()]:
        whole = path.read_bytes()
        for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 10 if whole else 0):
            flip(path, int(bit))
            with pytest.raises(UserError, match=f"{path.name} is altered"):
                load_variables(copy, 10)
        path.write_bytes(whole)
    assert load_variables(copy, 10)[1] == 10


def test_a_run_goes_on_from_the_newest_whole_checkpoint(copy, run, caplog):
    shutil.rmtree(copy / "checkpoints" / "10" / "optimizer")
    assert load_variables(copy)[1] == 10  # Its variables are whole.
    result = train(copy)
    assert result.started == 5 and "step 5 is used instead" in caplog.text
    whole, again = (jax.tree.leaves(load_variables(w)[0]) for w in (run, copy))
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert {p.name for p in (copy / "checkpoints").iterdir()} == {"5", "10", "10.damaged"}


def test_a_run_without_a_whole_checkpoint_does_not_start_anew_in_silence(copy):
    for step in (5, 10):
        flip(largest(copy / "checkpoints" / str(step)))
    with pytest.raises(
        UserError, match=r"no undamaged checkpoint.*to start from scratch, delete .*/checkpoints\.$"
    ):
        train(copy)
    assert {p.name for p in (copy / "checkpoints").iterdir()} == {"5", "10"}


def test_foreign_things_are_passed_over(copy):
    checkpoints = copy / "checkpoints"
    (checkpoints / "9999999").mkdir()
    (checkpoints / "9999999" / "note.txt").write_text("mine")
    (checkpoints / "12").mkdir()
    for name in ("6000", ".DS_Store", "._10", "²", "-3", "007"):
        (checkpoints / name).write_text("")
    shutil.copytree(checkpoints / "10", checkpoints / "10_backup")
    shutil.copytree(checkpoints / "10", checkpoints / "best")
    (checkpoints / "latest").symlink_to("10")
    before = {p.name for p in checkpoints.iterdir()}
    assert load_variables(copy)[1] == 10
    assert {p.name for p in checkpoints.iterdir()} == before
    assert train(copy, steps=13).started == 10
    names = {p.name for p in checkpoints.iterdir()}
    assert {"10_backup", "best", "latest", ".DS_Store", "9999999.foreign", "12.foreign", "10", "13"} <= names
    assert (checkpoints / "9999999.foreign" / "note.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", "null", '{"a": 1}', '{"method": 3}', "\ud83d", '{"a.b": {}}', "[" * 9999]
)
def test_odd_configs(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


def test_an_altered_config(tmp_path):
    write_config(tmp_path, make_config(steps=10))
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("10", "90"))
    with pytest.raises(UserError, match=r"config\.json does not match its checksum"):
        read_config(tmp_path)


def test_nothing_is_said_on_saving_and_loading(tmp_path, caplog, capfd):
    train(tmp_path)
    write_config(tmp_path, make_config(steps=10))
    load_variables(tmp_path)
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def train_frozen(workdir, steps=10, ema=0.5):
    optimizer = dict(make_config().optimizer, schedule="constant", multipliers=(("^tower/", None),), ema=ema)
    config = make_config(steps=steps, optimizer=optimizer)

    class Frozen(LinearMethod):
        """Beside the tower of the config's rule, a collection that never changes."""

        frozen = ("^table/",)

        def init(self, rng):
            return {**super().init(rng), "table": {"rows": jax.random.normal(rng, (10_000,))}}

    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    result = fit(config, workdir, Frozen(), make_batches(config), [], mesh)
    write_config(workdir, config)
    return result


def saved(step):
    return sum(p.stat().st_size for p in step.rglob("*") if p.is_file())


def test_frozen_variables_are_saved_once_a_run_and_come_back(tmp_path):
    whole = train_frozen(tmp_path / "whole")
    train_frozen(tmp_path / "run", steps=5)
    frozen = tmp_path / "run" / "checkpoints" / "frozen"
    written = {path: path.stat().st_mtime_ns for path in frozen.rglob("*")}
    assert train_frozen(tmp_path / "run").started == 5
    assert written == {path: path.stat().st_mtime_ns for path in frozen.rglob("*")}
    assert saved(tmp_path / "run" / "checkpoints" / "10" / "variables") < 10_000 < saved(frozen)
    for averaged, expected in ((True, whole.state.averaged), (False, whole.state.variables)):
        found = load_variables(tmp_path / "run", averaged=averaged)[0]
        assert jax.tree.structure(found) == jax.tree.structure(jax.device_get(expected))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
    tower = whole.state.params["tower"]["kernel"]
    np.testing.assert_array_equal(whole.state.average["tower"]["kernel"], tower)


def test_frozen_variables_are_checked_as_all_others(tmp_path):
    train_frozen(tmp_path, steps=5)
    frozen = tmp_path / "checkpoints" / "frozen"
    path = largest(frozen)
    whole = path.read_bytes()
    flip(path)
    for load in (lambda: load_variables(tmp_path), lambda: train_frozen(tmp_path)):
        with pytest.raises(
            UserError, match=r"no undamaged checkpoint: .*/5 is damaged: of frozen, .* is altered"
        ):
            load()
    path.write_bytes(whole)
    assert load_variables(tmp_path)[1] == 5
    shutil.rmtree(frozen)
    with pytest.raises(UserError, match=r"of frozen, checksums\.json is missing"):
        load_variables(tmp_path)
