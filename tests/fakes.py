"""A method and a data set so small that a whole run takes seconds; and, as a program, such a run.

python fakes.py WORKDIR '{"steps": 20}' [seconds of sleep a step]
"""

import json
import os
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ovseg_jax.protocols import Aux, Evaluator, Prediction, Segmenting, Trainable

DIM = 16


class LinearMethod(Trainable, Segmenting):
    """Regression with a normalisation whose running mean is state, and noise from the step's key."""

    def __init__(self, bad_step: int | None = None):
        self.bad_step = bad_step

    def init(self, rng):
        kernel = jax.random.normal(rng, (DIM, DIM)) * 0.1
        return {
            "params": {"layer": {"kernel": kernel, "bias": jnp.zeros(DIM)}, "tower": {"kernel": kernel.T}},
            "batch_stats": {"mean": jnp.zeros(DIM), "count": jnp.zeros((), jnp.int32)},
        }

    def loss(self, variables, batch, rng):
        params, stats = variables["params"], variables["batch_stats"]
        x = batch["x"] - stats["mean"]
        keep = jax.random.bernoulli(rng, 0.9, x.shape)
        out = (x * keep) @ params["layer"]["kernel"] @ params["tower"]["kernel"] + params["layer"]["bias"]
        error = jnp.sum((out - batch["y"]) ** 2, axis=-1)
        if self.bad_step is not None:
            error = jnp.where(stats["count"] == self.bad_step - 1, jnp.nan, error)
        weight = batch["example_mask"].astype(jnp.float32)
        total, count = jnp.sum(error * weight), jnp.sum(weight)
        mean = 0.9 * stats["mean"] + 0.1 * jnp.mean(batch["x"], axis=0)
        mutated = {"batch_stats": {"mean": mean, "count": stats["count"] + 1}}
        return total / count, Aux({"error": (total, count), "never": (jnp.zeros(()), jnp.zeros(()))}, mutated)

    def predict(self, variables, image, image_size):
        return Prediction(None, {}, {"": jnp.zeros((*image.shape[:3], DIM))})

    def embed_text(self, variables, texts):
        return {"": jnp.ones((len(texts), DIM)) / DIM**0.5}


class CountingEvaluator(Evaluator):
    """Reports the norm of the parameters, and remembers when it ran."""

    def __init__(self, name="validation", every=5):
        self.name, self.every, self.runs, self.tables = name, every, 0, {}

    def run(self, variables):
        self.runs += 1
        return {"norm": float(sum(jnp.sum(x**2) for x in jax.tree.leaves(variables["params"])))}


def example(index):
    rng = np.random.default_rng(int(index))
    x = rng.normal(size=DIM).astype(np.float32)
    return {"x": x, "y": np.roll(x, 1), "example_mask": np.bool_(True)}


def make_batches(config, sleep=0.0):
    """step -> an iterator of this process's share of each batch from there on."""
    count = jax.process_count()
    share = config.batch_size // count

    def load(index):
        time.sleep(sleep / config.batch_size)
        return example(index)

    data = grain.MapDataset.range(64).seed(config.seed).shuffle().repeat().map(load)
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)

    def batches(start):
        rows = data[start * config.batch_size :].batch(share)  # A batch is `count` of these.
        return iter(rows[jax.process_index() :: count].to_iter_dataset(reading))

    return batches


def make_config(**changes):
    config = ConfigDict(
        dict(
            method="linear",
            seed=3,
            steps=20,
            batch_size=8,
            mesh=dict(data=-1, fsdp=1),
            optimizer=dict(
                name="adamw",
                learning_rate=1e-2,
                schedule="cosine",
                warmup_steps=2,
                weight_decay=1e-2,
                clip_norm=1.0,
            ),
            checkpoint=dict(every=5, keep=2),
            log_every=2,
        )
    )
    config.update(changes)
    return config


def main(workdir, changes, sleep):
    from ovseg_jax.cli.console import print_error, silence
    from ovseg_jax.errors import UserError
    from ovseg_jax.main import join_processes
    from ovseg_jax.parallel.sharding import make_mesh, replicated
    from ovseg_jax.train import checkpoints
    from ovseg_jax.train.loop import fit

    config = make_config(**json.loads(changes))
    config.unlock()
    bad_step = config.get("bad_step")
    if config.get("blind"):  # To the disk being nearly full, so that writing fails half-way.
        checkpoints.METADATA_BYTES = -(1 << 40)
    silence()
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        join_processes()
    mesh = make_mesh(config.mesh)
    try:
        result = fit(
            config,
            workdir,
            LinearMethod(bad_step),
            make_batches(config, float(sleep)),
            [CountingEvaluator()],
            mesh,
        )
    except UserError as error:
        return print_error(error)
    if not result.stopped:
        whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))
        flat, _ = jax.flatten_util.ravel_pytree(
            jax.device_get(whole((result.state.variables, result.state.opt_state)))
        )
        print("sum", np.asarray(flat).tobytes().hex())
    return 0


if __name__ == "__main__":
    import jax.flatten_util

    sys.exit(main(*sys.argv[1:], *(["0"] if len(sys.argv) < 4 else [])))
