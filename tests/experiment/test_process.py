"""Real processes: told to stop, killed, and run again with the same command."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
STEPS = {"steps": 40, "checkpoint": {"every": 4, "keep": 2}}


def command(workdir, changes, sleep=0.0):
    return [sys.executable, str(HERE.parent / "fakes.py"), str(workdir), json.dumps(changes), str(sleep)]


def environment():
    flags = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return (
        os.environ
        | flags
        | {"PYTHONPATH": str(HERE.parents[1]) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    )


def start(workdir, changes, sleep=0.0):
    return subprocess.Popen(
        command(workdir, changes, sleep),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(workdir, changes, sleep=0.0):
    """Two processes of four devices each, which are one run."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    processes = []
    for number in range(2):
        joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}
        devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = environment() | joined | devices
        processes.append(subprocess.Popen(command(workdir, changes, sleep), env=env, **pipes))
    return processes


def finish_two(processes):
    """Both end well, and say the same."""
    ends = [finish(process) for process in processes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    return ends


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def parameters(out):
    return next(line for line in out.splitlines() if line.startswith("sum "))


def wait_for_checkpoint(process, workdir, step):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(p.name.isdigit() and int(p.name) >= step for p in (workdir / "checkpoints").glob("*")):
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint: {finish(process)}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    code, out, err = finish(start(tmp_path_factory.mktemp("whole"), STEPS))
    assert code == 0, err
    return parameters(out)


def test_told_to_stop_it_saves_says_so_and_goes_on(tmp_path, undisturbed):
    begun = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(tmp_path, STEPS, sleep=0.1)
        wait_for_checkpoint(process, tmp_path, begun + 4)
        process.send_signal(number)
        code, out, err = finish(process)
        assert code == 0, err
        assert not begun or f"continuing from the checkpoint at step {begun}" in err
        said = next(line for line in err.splitlines() if line.startswith("saved at step"))
        step = int(said.split()[3].rstrip(";"))
        assert said.endswith("run the same command to continue") and begun + 4 <= step < 40
        assert (tmp_path / "checkpoints" / str(step)).is_dir()
        begun = step
    code, out, err = finish(start(tmp_path, STEPS))
    assert code == 0 and f"continuing from the checkpoint at step {begun}" in err
    assert parameters(out) == undisturbed


def test_killed_it_goes_on_bitwise_equal(tmp_path, undisturbed):
    # Killed twice, at whatever it happens to be doing: once it was surely past a checkpoint.
    process = start(tmp_path, STEPS, sleep=0.05)
    wait_for_checkpoint(process, tmp_path, 8)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    process = start(tmp_path, STEPS, sleep=0.05)
    wait_for_checkpoint(process, tmp_path, 20)
    process.kill()
    finish(process)
    # What a kill in the middle of a write leaves behind.
    (tmp_path / "checkpoints" / "96.orbax-checkpoint-tmp").mkdir()
    code, out, err = finish(start(tmp_path, STEPS))
    assert code == 0, err
    assert parameters(out) == undisturbed
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(40) == 2  # The log's, and the evaluation's.


def test_a_nan_ends_in_a_sentence(tmp_path):
    code, _, err = finish(start(tmp_path, {**STEPS, "bad_step": 7}))
    assert code == 1
    assert "error: training stopped at step 7, where error, loss" in err and "Traceback" not in err
    assert [p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")] == ["4"]


@pytest.mark.parametrize("blind", [False, True])
def test_a_full_disk_ends_in_a_sentence_and_keeps_the_last_checkpoint(tmp_path, blind):
    script = 'mount -t tmpfs -o size=2m tmpfs "$0" && "$@"; code=$?; ls "$0/checkpoints"; exit $code'
    probe = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs tmpfs "$0"', tmp_path]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes user namespaces")
    # Every checkpoint is kept, so that the disk fills up.
    changes = {**STEPS, "steps": 1000, "checkpoint": {"every": 1, "keep": 1000}, "blind": blind}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, tmp_path, *command(tmp_path, changes)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert f"error: the disk is full while writing to {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "1" in done.stdout.split()


FSDP = {**STEPS, "mesh": {"data": 2, "fsdp": 4}}


@pytest.fixture(scope="module")
def two_undisturbed(tmp_path_factory):
    ends = finish_two(start_two(tmp_path_factory.mktemp("two"), FSDP))
    assert parameters(ends[0][1]) == parameters(ends[1][1])
    return parameters(ends[0][1])


def values(line):
    return np.frombuffer(bytes.fromhex(line.removeprefix("sum ")), np.float32)


def test_two_processes_learn_what_one_does(undisturbed, two_undisturbed):
    np.testing.assert_allclose(values(two_undisturbed), values(undisturbed), rtol=1e-4, atol=1e-6)


def test_one_of_two_is_told_to_stop_or_killed_and_both_go_on_bitwise_equal(tmp_path, two_undisturbed):
    """Told to stop, both save the same step."""
    processes = start_two(tmp_path, FSDP, sleep=0.1)
    wait_for_checkpoint(processes[0], tmp_path, 4)
    processes[1].send_signal(signal.SIGTERM)
    (_, _, err), _ = finish_two(processes)
    step = int(
        next(line for line in err.splitlines() if line.startswith("saved at step")).split()[3].rstrip(";")
    )
    assert 4 <= step < 40 and (tmp_path / "checkpoints" / str(step)).is_dir()
    processes = start_two(tmp_path, FSDP, sleep=0.1)
    wait_for_checkpoint(processes[0], tmp_path, step + 4)
    processes[1].kill()
    processes[0].kill()  # As a scheduler does; by itself it would fail at the next exchange.
    (_, _, err), _ = map(finish, processes)
    assert f"continuing from the checkpoint at step {step}" in err
    (_, out, _), _ = finish_two(start_two(tmp_path, FSDP))
    assert parameters(out) == two_undisturbed


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, undisturbed):
    process = start(tmp_path, STEPS, sleep=0.05)
    wait_for_checkpoint(process, tmp_path, 8)
    process.kill()
    finish(process)
    processes = start_two(tmp_path, FSDP, sleep=0.1)
    wait_for_checkpoint(processes[0], tmp_path, 20)
    for process in processes:
        process.kill()
        finish(process)
    code, out, err = finish(start(tmp_path, STEPS))
    assert code == 0 and "continuing from the checkpoint at step" in err
    np.testing.assert_allclose(values(parameters(out)), values(undisturbed), rtol=1e-4, atol=1e-6)
