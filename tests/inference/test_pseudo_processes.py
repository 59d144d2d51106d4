"""Two processes make masks in shards, a teacher's or clusters, train on them, and go on after a kill; so does UMG-CLIP.

Its adaptation is FC-CLIP with another trunk, and has all of Mask2Former but its backbone.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath

from ovseg_jax.data.sources.build import make_source
from ovseg_jax.inference.cluster_masks import cluster_stage
from ovseg_jax.inference.pseudo_masks import label_stage
from ovseg_jax.train.checkpoints import load_variables
from tests.fast import xla_flags

ROOT = Path(__file__).parents[2]
OPENSEG = """
from configs import openseg

def get_config(arg=None):
    config = openseg.get_config("images=8,captioned=10,pseudo=true")
    for one in (config, config.stages[0]["config"]):
        one.update(dict(steps=2, batch_size=4, evals={}))
        one.final_evals = {}
        one.model.update(dict(width=16, embed_dim=16, decoder_layers=1, num_queries=4))
        one.model.backbone.width = 16
        one.data.image_size, one.data.batch_augment = 32, []
        one.loss.group = 4
    config.steps = 0  # the masks are looked at, not the student
    config.stages[1]["config"].update(dict(shard_size=3, min_confidence=0.0, batch_size=2))
    return config
"""
PSEG = """
from configs import pseg

def get_config(arg=None):
    config = pseg.get_config("images=24,form=paper,ahead=true")
    config.update(dict(steps=6, batch_size=4, log_every=1))
    config.checkpoint.every = 2
    config.evals = {}
    config.final_evals = {}
    config.model.update(dict(width=32, embed_dim=16))
    config.model.backbone.width = 16
    config.model.layers = config.text.layers = 1
    config.stages[0]["config"].update(dict(shard_size=2, batch_size=4))
    return config
"""
UMG_CLIP = """
from configs import umg_clip

def get_config(arg=None):
    config = umg_clip.get_config()
    config.stages, config.evals, config.final_evals = [], {}, {}
    config.towers.init, config.towers.tokenizer, config.fcclip.prompt = "", "words", ["{}"]
    config.towers.image.update(dict(grid=4, rope_grid=4, width=16, depth=1, heads=2, hidden=24, embed_dim=16))
    config.towers.text.update(dict(width=16, embed_dim=16))
    config.model.update(dict(num_queries=4, width=32, mask_dim=16, layers=1, ffn=16, encoder_ffn=16))
    config.towers.image_size = config.data.image_size = 32
    config.loss.points = 16
    config.data.train[0].update(dict(cache=False, num_examples=16, size="tiny"))
    config.update(dict(batch_size=4, steps=6, log_every=1))
    config.checkpoint.every = 2
    return config
"""


def start(folder, process, port):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(2),
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(process),
    }
    flags = [f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"]
    command = [sys.executable, "-m", "ovseg_jax.main", *flags]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_two(folder, config, until=None, then=None):
    """Runs two processes to their end, or kills them once `until()` is true; gives [(stdout, stderr), ...].

    With `then`, they are not killed, but stopped while it is called, and go on.
    """
    folder.mkdir(exist_ok=True)
    (folder / "config.py").write_text(config)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    running = [start(folder, process, port) for process in range(2)]
    try:
        while until is not None and not until() and all(process.poll() is None for process in running):
            time.sleep(0.005)
        if then is not None:
            for process in running:
                process.send_signal(signal.SIGSTOP)
            then()
            for process in running:
                process.send_signal(signal.SIGCONT)
        elif until is not None:
            for process in running:
                process.kill()
        ends = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    code = 0 if until is None or then is not None else -signal.SIGKILL
    assert [process.returncode for process in running] == [code] * 2, ends[0][1][-2000:] + ends[1][1][-2000:]
    return ends


def same_masks(folders, source, count):
    sources = [make_source(dict(source, masks=str(folder))) for folder in folders]
    for index in range(count):
        np.testing.assert_array_equal(*(source[index]["segments"] for source in sources))


def test_two_processes_share_the_shards(tmp_path):
    ends = run_two(tmp_path, OPENSEG)
    assert "10 images labelled" in ends[0][0] and "labelled" not in ends[1][0]
    masks = tmp_path / "run" / "masks"
    assert len([*masks.glob("*.zip")]) == 4
    assert json.loads((masks / "statistics.json").read_text())["images"] == 10
    labels = json.loads((masks / "stage.json").read_text())["config"]
    teacher = str(tmp_path / "run" / "teacher")
    label_stage(epath.Path(tmp_path / "alone"), **labels | {"teacher": teacher})
    same_masks((masks, tmp_path / "alone"), labels["source"], 10)


def ends_equal(own, config, killed):
    """Runs to the end, and again from what a kill leaves after two steps; both must have the same variables."""
    # A copy that is made while both processes stand still.
    copy = lambda: shutil.copytree(own.parent, killed)
    run_two(own.parent, config, (own / "checkpoints" / "2").exists, copy)
    assert not (killed / "run" / "summary.json").exists()
    (_, said), _ = run_two(killed, config)
    assert "continuing from the checkpoint at step" in said
    whole, again = (load_variables(folder)[0] for folder in (own, killed / "run"))
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_umg_clip_on_two_processes_is_killed_and_ends_bitwise_equal(tmp_path):
    ends_equal(tmp_path / "whole" / "run", UMG_CLIP, tmp_path / "killed")


def test_pseg_on_two_processes_is_killed_and_ends_bitwise_equal(tmp_path):
    own, killed = tmp_path / "whole" / "run", tmp_path / "killed"
    # Killed while the images are clustered.
    run_two(tmp_path / "whole", PSEG, lambda: any(own.glob("masks/*.zip")))
    assert not (own / "masks" / "stage.json").exists()
    ends_equal(own, PSEG, killed)
    made = json.loads((own / "masks" / "stage.json").read_text())["config"]
    cluster_stage(epath.Path(tmp_path / "alone"), **made)
    same_masks((own / "masks", tmp_path / "alone"), made["source"], 24)
