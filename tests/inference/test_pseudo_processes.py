"""Two processes train a teacher, label images in shards, and train a student on human and pseudo-masks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from etils import epath

from ovseg_jax.data.sources.build import make_source
from ovseg_jax.inference.pseudo_masks import label_stage
from tests.fast import xla_flags

ROOT = Path(__file__).parents[2]
CONFIG = """
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
    config.stages[1]["config"].update(dict(shard_size=3, min_confidence=0.0, batch_size=2))
    return config
"""


def start(folder, process, port):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(2),
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(process),
    }
    flags = [f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"]
    command = [sys.executable, "-m", "ovseg_jax.main", *flags]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_the_shards(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    running = [start(tmp_path, process, port) for process in range(2)]
    try:
        ends = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], ends[0][1][-2000:] + ends[1][1][-2000:]
    assert "10 images labelled" in ends[0][0] and "labelled" not in ends[1][0]
    masks = tmp_path / "run" / "masks"
    assert len([*masks.glob("*.zip")]) == 4
    assert json.loads((masks / "statistics.json").read_text())["images"] == 10
    labels = json.loads((masks / "stage.json").read_text())["config"]
    teacher = str(tmp_path / "run" / "teacher")
    label_stage(epath.Path(tmp_path / "alone"), **labels | {"teacher": teacher})
    sources = [
        make_source(dict(labels["source"], masks=str(folder))) for folder in (masks, tmp_path / "alone")
    ]
    for index in range(10):
        np.testing.assert_array_equal(*(source[index]["segments"] for source in sources))
