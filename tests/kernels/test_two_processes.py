"""Every sharded kernel and the mask losses on two real processes of four devices: the values and gradients of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.fast import xla_flags

HERE = Path(__file__).parent


def results(axes, place):
    """Name -> [loss, sums of the gradients with fixed weights]: what any devices must agree on."""
    import test_all_pairs
    import test_grounding
    import test_sampled_softmax as sampled

    from ovseg_jax.kernels.contrastive import Contrast, contrastive_loss
    from ovseg_jax.kernels.grounding import grounding_loss
    from ovseg_jax.kernels.sampled_softmax import full_softmax, sampled_softmax
    from ovseg_jax.losses.masks import best_match_dice_loss
    from ovseg_jax.losses.matching import matched_losses

    def summary(function, differentiable, rest):
        step = jax.value_and_grad(lambda d, r: function(d, r).loss)

        def run(differentiable, rest):
            value, grads = step(differentiable, rest)
            weigh = lambda g: jnp.sum(g * jnp.cos(jnp.arange(g.size).reshape(g.shape)))
            return jnp.stack([value, *map(weigh, jax.tree.leaves(grads))])

        return [float(x) for x in jax.jit(run)(place(differentiable), place(rest))]

    found = {}
    data = test_grounding.make()
    taus = jnp.float32(test_grounding.TAU), jnp.float32(test_grounding.TAU2)
    rest = {k: data.pop(k) for k in ("word_valid", "example_mask")}
    image, text, valid = test_all_pairs.make()
    known = dict(region_temperature=taus[0], pair_temperature=taus[1])
    # Groups of two devices' examples.
    grouped = lambda d, r: grounding_loss(**d, **r, **known, group=len(image) // 4, batch_axes=axes)
    found["grouped"] = summary(grouped, data, rest)
    rng, b = np.random.default_rng(0), len(image)
    targets = dict(masks=rng.random((b, 3, 6, 6)) < 0.5, valid=rng.random((b, 3)) < 0.7)
    targets["weight"] = rng.choice(np.float32([0, 0.1, 1]), b)

    def masks(d, r):
        given = d["logits"], r["masks"].astype(jnp.float32), r["valid"], r["weight"]
        total, count = best_match_dice_loss(*given)
        matched = matched_losses(given[0][:, None], *given[1:], batch_axes=axes)
        return Contrast(total / count + matched.total(), total, count)

    found["masks"] = summary(masks, {"logits": rng.normal(size=(b, 5, 6, 6)).astype(np.float32)}, targets)
    for form in ("gather", "ring") if axes else ("dense",):
        ground = lambda d, r, form=form: grounding_loss(
            **d, **r, **known, group=None, form=form, batch_axes=axes
        )
        found[f"grounding {form}"] = summary(ground, data, rest)
        for kind in ("softmax", "sigmoid"):
            pairs = lambda d, r, form=form, kind=kind: contrastive_loss(
                **d, **r, temperature=jnp.float32(0.3), kind=kind, form=form, batch_axes=axes
            )
            found[f"{kind} {form}"] = summary(pairs, {"image": image, "text": text}, {"valid": valid})
    params, tokens, image, labels, valid = sampled.make()
    for name, how in (("sampled", dict(key=sampled.KEY, sample=sampled.K)), ("full", dict(chunk=4))):
        function = sampled_softmax if name == "sampled" else full_softmax
        classes = lambda d, r, function=function, how=how: function(
            sampled.encode, params, tokens, **d, **r, scale=sampled.SCALE, batch_axes=axes, **how
        )
        found[name] = summary(classes, {"image": image}, {"labels": labels, "valid": valid})
    return found


def worker(port: int, process: int) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    from ovseg_jax.parallel.sharding import AXES, make_mesh, put_batch

    mesh = make_mesh({"data": 4, "fsdp": 2})
    share = lambda x: np.split(np.asarray(x), 2)[process]
    with jax.set_mesh(mesh):
        found = results(AXES, lambda tree: put_batch(jax.tree.map(share, tree), mesh))
    print("found " + json.dumps(found))


def test_two_processes_of_four_devices_equal_one_device():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(4),
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen([sys.executable, __file__, str(port), str(i)], env=env, **pipes) for i in range(2)
    ]
    try:
        ends = [p.communicate(timeout=300) for p in running]
    finally:
        for p in running:
            p.kill()
    assert [p.returncode for p in running] == [0, 0], ends[0][1][-3000:]
    one = results((), lambda tree: jax.tree.map(jnp.asarray, tree))
    for out, _ in ends:
        line = next(line for line in out.splitlines() if line.startswith("found "))
        for name, got in json.loads(line[6:]).items():
            kernel = name.split()[0]
            want = one.get(name) or one[f"{kernel} dense"]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=name)


if __name__ == "__main__":
    worker(*map(int, sys.argv[1:]))
