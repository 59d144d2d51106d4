"""Two processes, which each read their own images, and one process return the same numbers."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.fast import xla_flags


def worker(port: int, process: int, count: int) -> None:
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, process)
    import test_classification_eval as whole
    import test_instances_and_panoptic
    from test_segmentation import CLASSES, VARIABLES, PatchMethod, batches, examples

    from ovseg_jax.evals.classification import ClassificationEvaluator
    from ovseg_jax.evals.instances import InstancesEvaluator
    from ovseg_jax.evals.panoptic import PanopticEvaluator
    from ovseg_jax.evals.segmentation import SegmentationEvaluator
    from ovseg_jax.parallel.sharding import make_mesh, replicated

    mesh = make_mesh()
    variables = jax.device_put(VARIABLES, replicated(mesh))
    share = batches(examples()[process::count], 4 // count)
    evaluator = SegmentationEvaluator("x", PatchMethod(), CLASSES, share, mesh, masks=("predicted", "truth"))
    scores = evaluator.run(variables)
    for kind in (PanopticEvaluator, InstancesEvaluator):
        share = batches(test_instances_and_panoptic.data()[process::count], 4 // count)
        scores |= kind("x", test_instances_and_panoptic.Guess(), CLASSES, share, mesh).run(variables)
    share = whole.batches(whole.examples()[process::count], 8 // count)
    method = whole.RandomMethod()
    evaluator = ClassificationEvaluator("x", method, whole.CLASSES, share, mesh, prompts=whole.PROMPTS)
    variables = jax.device_put(whole.VARIABLES, replicated(mesh))
    print("scores " + json.dumps(scores | evaluator.run(variables)))


def start(port, process, count):
    here = Path(__file__).parent
    env = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=xla_flags(2),
        PYTHONPATH=os.pathsep.join([str(here.parents[1]), str(here.parent), str(here)]),
    )
    args = [sys.executable, __file__, str(port), str(process), str(count)]
    return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(next(line for line in out.splitlines() if line.startswith("scores "))[7:])


def test_every_process_returns_the_numbers_of_one():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    running = [start(port, i, 2) for i in range(2)]
    try:
        several = [finish(p) for p in running]
    finally:
        for p in running:
            p.kill()
    alone = finish(start(port, 0, 1))
    assert several[0] == several[1] == pytest.approx(alone, rel=1e-6)
    assert all(0 < alone[name] < 100 for name in ("miou", "accuracy", "pq", "ap"))


if __name__ == "__main__":
    worker(*map(int, sys.argv[1:]))
