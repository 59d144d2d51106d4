"""Memory and time of a clustered image tower's forward and backward pass against all of its tokens.

    python tests/benchmarks/token_clusters.py [--model=eva02_clip_l14_336] [--topology=v4:2x2x1] [--batch=1]

An EVA at 336 pixels: gradients of a mean over the embedding and the token map, with value features. Without
a topology the program is compiled for the CPU and timed in CPU seconds, the fastest of two runs after a first. With one
it is compiled for one chip in bfloat16 by the TPU's own compiler, and the time is a roofline: the longest of compute
and memory at the chip's peaks.
"""

import argparse
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from ovseg_jax.costs.flops import count_flops
from ovseg_jax.costs.hlo import count_traffic
from ovseg_jax.costs.plan import devices_of
from ovseg_jax.models.eva import PRESETS, Eva
from ovseg_jax.models.token_clusters import with_clusters
from ovseg_jax.plan import use_compiler_alone


def main() -> None:
    """Prints memory, operations and time for all tokens and for a quarter of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--topology", default="", help="TPUs to compile for, see ovseg_jax.plan")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--after", type=int, default=2, help="blocks before the clustering")
    parser.add_argument("--model", default="eva02_clip_l14_336", help="a preset of models.eva")
    parser.add_argument("--side", type=int, default=336, help="side of an image in pixels")
    parser.add_argument("--remat", default="none", help="see models.remat")
    args = parser.parse_args()
    use_compiler_alone()
    chip = mesh = None
    if args.topology:
        chip, mesh = devices_of(args.topology, ConfigDict())
    dtype = jnp.bfloat16 if chip else jnp.float32
    whole = Eva(**PRESETS[args.model], last="value", remat=args.remat, dtype=dtype)
    for name, tower in (("100%", whole), ("25%", with_clusters(whole, after=args.after))):
        image = jax.ShapeDtypeStruct((args.batch, args.side, args.side, 3), dtype)
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
            for _ in range(3):
                start = time.process_time()
                jax.block_until_ready(compiled(variables, pixels))
                took.append(time.process_time() - start)
            line += f", {min(took[1:]):.1f} s"
        print(line, flush=True)


if __name__ == "__main__":
    main()
