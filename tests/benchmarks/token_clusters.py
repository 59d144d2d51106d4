"""Memory and time of a clustered image tower's forward and backward pass against all of its tokens.

    python tests/benchmarks/token_clusters.py [--topology=v4:2x2x1] [--batch=1] [--after=2] [--remat=none]

EVA-02-CLIP L/14 at 336 pixels in one process: gradients of a mean over the embedding and the token map, with value
features. Without a topology the program is compiled for the CPU and timed in CPU seconds, the fastest of three. With
one it is compiled for one chip in bfloat16 by the TPU's own compiler, and the time is a roofline, the longest of
compute and memory at the chip's peaks.
"""

import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from ovseg_jax.costs.flops import count_flops
from ovseg_jax.costs.hlo import count_traffic
from ovseg_jax.costs.plan import devices_of
from ovseg_jax.models.eva import PRESETS, Eva
from ovseg_jax.models.token_clusters import with_clusters
from ovseg_jax.plan import use_compiler_alone

_TOPOLOGY = flags.DEFINE_string("topology", "", "TPUs to compile for, see ovseg_jax.plan.")
_BATCH = flags.DEFINE_integer("batch", 1, "Images.")
_AFTER = flags.DEFINE_integer("after", 2, "Blocks before the clustering.")
_MODEL = flags.DEFINE_string("model", "eva02_clip_l14_336", "A preset of models.eva.")
_SIDE = flags.DEFINE_integer("side", 336, "Side of an image in pixels.")
_REMAT = flags.DEFINE_string("remat", "none", "See models.remat.")


def main(argv):
    del argv
    use_compiler_alone()
    chip = mesh = None
    if _TOPOLOGY.value:
        chip, mesh = devices_of(_TOPOLOGY.value, ConfigDict())
    dtype = jnp.bfloat16 if chip else jnp.float32
    whole = Eva(**PRESETS[_MODEL.value], values=True, remat=_REMAT.value, dtype=dtype)
    for name, tower in (("100%", whole), ("25%", with_clusters(whole, after=_AFTER.value))):
        image = jax.ShapeDtypeStruct((_BATCH.value, _SIDE.value, _SIDE.value, 3), dtype)
        shapes = jax.eval_shape(tower.init, jax.random.key(0), image)

        def loss(variables, image, tower=tower):
            out = tower.apply(variables, image)
            return jnp.square(out.pooled).mean() + jnp.square(out.tokens).mean()

        where = SingleDeviceSharding(mesh.devices.flat[0]) if mesh else None
        step = jax.jit(jax.grad(loss), in_shardings=where, out_shardings=where)
        traced = step.trace(shapes, image)
        flops = count_flops(traced.jaxpr.jaxpr, 1)
        compiled = traced.lower().compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        line = f"{name}: {memory / 2**30:.2f} GiB beside parameters and gradients, {flops / 1e12:.2f} TFLOP"
        if chip:
            accessed = count_traffic(compiled.as_text()).accessed
            line += f", {1e3 * max(flops / chip.flops, accessed / chip.bandwidth):.1f} ms"
        else:
            variables = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes)
            pixels = jax.random.normal(jax.random.key(0), image.shape, dtype)
            took = []
            for _ in range(4):
                start = time.process_time()
                jax.block_until_ready(compiled(variables, pixels))
                took.append(time.process_time() - start)
            line += f", {min(took[1:]):.1f} s"
        print(line, flush=True)


if __name__ == "__main__":
    flags.FLAGS(sys.argv)
    app.run(main)
