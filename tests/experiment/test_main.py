"""The command itself, on the shipped config made small."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ovseg_jax import main as command
from ovseg_jax.main import default_workdir
from ovseg_jax.train.checkpoints import load_variables
from tests.absl_commands import run_command
from tests.fast import xla_flags

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parents[1] / "tiny.py"


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The programs compiled by one test serve the others, and nothing is left in the user's own cache."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def start(cache):
    """Starts the command; a last line on stdout tells which of the forbidden packages were imported."""
    code = (
        "import sys, atexit; "
        "atexit.register(lambda: print('IMPORTED', {'tensorflow', 'torch'} & set(sys.modules))); "
        "from ovseg_jax.main import main; main()"
    )
    environment = os.environ | {
        # One device: programs of several CPU devices are not kept.
        "XLA_FLAGS": xla_flags(1),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

    def run(*arguments, cwd=None):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, cwd=cwd, **pipes)

    return run


@pytest.fixture(scope="session")
def main(start):
    """Runs the command to its end."""

    def run(*arguments, cwd=None):
        process = start(*arguments, cwd=cwd)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def sentence(done):
    """The only thing on stderr of a run that failed by a user's mistake."""
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def trained(main, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    done = main(f"--config={TINY}:steps=6", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_run_leaves_what_it_promises(trained):
    workdir, done = trained
    names = {path.name for path in workdir.iterdir()}
    assert {
        "checkpoints",
        "config.json",
        "words.json",
        "classes.json",
        "metrics.jsonl",
        "summary.json",
    } <= names
    assert {p.name for p in (workdir / "checkpoints").iterdir() if p.is_dir()} == {"3", "6"}
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["images_per_second"] > 0 and summary["data_wait_seconds"] >= 0
    assert {"test/miou", "test/miou_gt", "test/grounding_miou", "test/recall@0.5"} <= set(summary)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6]
    assert [r["step"] for r in records if "validation/miou" in r] == [4]
    (table,) = (workdir / "tables").glob("test-*.csv")
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len(json.loads((workdir / "classes.json").read_text())["names"])
    assert f"{summary['test/miou']:.2f}" in done.stdout
    assert f"next: python -m ovseg_jax.predict --checkpoint={workdir}" in done.stdout
    assert "step 6/6, loss" in done.stderr
    assert "IMPORTED set()" in done.stdout


def test_it_says_nothing_but_what_it_means(trained):
    _, done = trained
    assert all(line.startswith("step ") for line in done.stderr.splitlines()), done.stderr


def test_a_finished_run_shows_its_scores_again(main, trained):
    workdir, _ = trained
    before = (workdir / "summary.json").read_text()
    done = main(f"--config={TINY}:steps=6", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "has already completed its 6 steps" in done.stdout and "held_out" in done.stdout
    assert (workdir / "summary.json").read_text() == before


def test_killed_and_started_again_it_ends_bitwise_equal(start, main, trained, tmp_path):
    arguments = [f"--config={TINY}:steps=6", f"--workdir={tmp_path}"]
    process = start(*arguments)
    deadline = time.monotonic() + 200
    while not (tmp_path / "checkpoints" / "3").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()  # Step 4's evaluation, which compiles first, is far from done by now.
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = main(*arguments)
    assert done.returncode == 0 and "continuing from the checkpoint at step 3" in done.stderr, done.stderr
    whole, again = (jax.tree.leaves(load_variables(w)[0]) for w in (trained[0], tmp_path))
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluation_alone(main, trained):
    workdir, _ = trained
    done = main(f"--config={TINY}:steps=6", f"--workdir={workdir}", "--mode=eval")
    assert done.returncode == 0, done.stderr
    score = json.loads((workdir / "summary.json").read_text())["test/miou"]
    assert "at step 6" in done.stdout and f"{score:.2f}" in done.stdout


def test_another_config_in_the_same_folder(trained):
    workdir, _ = trained
    error = sentence(
        run_command(command.main, f"--config={TINY}:seed=1", f"--workdir={workdir}", "--config.batch_size=8")
    )
    assert "batch_size was 4, is 8" in error and "seed was 0, is 1" in error
    assert "another --workdir" in error


def test_no_run_to_evaluate(tmp_path):
    error = sentence(
        run_command(command.main, f"--config={TINY}", f"--workdir={tmp_path}/none", "--mode=eval")
    )
    assert f"{tmp_path}/none holds no run" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=nowhere.py"], ["nowhere.py"]),
        ([f"--config={TINY}:stepz=3"], ["stepz", "steps"]),
        ([f"--config={TINY}:steps=few"], ["steps", "few"]),
        ([f"--config={TINY}", "--config.optimizer.learning_rat=1"], ["learning_rat"]),
        ([f"--config={TINY}", "--config.steps=few"], ["steps", "few"]),
        ([f"--config={TINY}", "--config.loss.form=ring"], ["loss.form has no effect", "group"]),
        ([f"--config={TINY}", "--mode=eval", "--config.steps=9"], ["steps has no effect with --mode=eval"]),
        ([f"--config={TINY}", "--wordkir=here"], ["wordkir"]),
        ([f"--config={TINY}", "--mode=dance"], ["dance"]),
        ([f"--config={TINY}", "here"], ["here"]),
        ([], ["--config"]),
    ],
)
def test_mistakes_on_the_command_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = sentence(run_command(command.main, *arguments))
    for word in words:
        assert word in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag", ["", *(f"--xla_force_host_platform_device_count={n}" for n in (1, 2))])
def test_programs_of_several_cpu_devices_are_not_kept(flag, tmp_path):
    """Out of the cache they come without the order of their collectives, and a run that goes on would freeze."""
    code = (
        "import jax; from ovseg_jax.main import use_all_cores; "
        "from ovseg_jax.cli.console import use_compilation_cache; "
        "use_all_cores(batch_size=2); use_compilation_cache(); "
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0); "
        "jax.jit(lambda x: x + 1)(jax.numpy.ones(8)); print(jax.device_count())"
    )
    environment = os.environ | {
        "XLA_FLAGS": flag,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    devices = int(done.stdout)
    assert devices == int(flag[-1:] or min(2, len(os.sched_getaffinity(0))))
    assert bool(list(tmp_path.iterdir())) is (devices == 1)


def test_default_workdir():
    assert default_workdir(["--config=configs/openseg.py"]) == "runs/openseg"
    arguments = [
        "--mode=train",
        "--config=a/openseg.py:data=coco,data_dir=../x/coco/,size=tiny",
        "--config.steps=9",
    ]
    assert default_workdir(arguments) == "runs/openseg-data=coco-data_dir=coco-size=tiny-steps=9"
