"""What a global contrastive loss costs a TPU core, forward and backward, compiled for a pod that is not there.

    python tests/benchmarks/all_pairs.py [--topology=v3:4x8] [--batch=256,1024,4096]

Compiles OpenSeg's grounding loss (128 regions, 16 words, D 640, bfloat16) and the image-text loss (D 512) ahead of
time, in each form, and prints for one core: temporary memory, FLOPs and bytes accessed a step, and the collectives.
Loops count as often as they run. "picked" is what training takes.
Needs `pip install -e '.[tpu]'` and an x86-64 Linux machine, but no TPU.
"""

import argparse
import os
from functools import partial

os.environ.update(TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from ovseg_jax.costs.flops import count_flops
from ovseg_jax.costs.hlo import count_traffic
from ovseg_jax.kernels.all_pairs import pick
from ovseg_jax.kernels.contrastive import contrastive_loss
from ovseg_jax.kernels.grounding import grounding_loss
from ovseg_jax.parallel.sharding import AXES, batch_sharding, make_mesh, replicated

REGIONS, WORDS, WIDTH, EMBED = 128, 16, 640, 512
SIZES = {"grounding": (4 * REGIONS * WORDS, REGIONS / WORDS), "image_text": (4, 1)}
MIB = 2**20


def grounding(form, regions, words, word_valid, example_mask, tau):
    how = dict(group=16) if form == "unsync" else dict(group=None, form=form)
    return grounding_loss(regions, words, word_valid, example_mask, tau, tau, batch_axes=AXES, **how).loss


def image_text(form, image, text, valid, tau):
    return contrastive_loss(image, text, valid, tau, form=form, batch_axes=AXES).loss


def arguments(loss, batch, mesh):
    shape = lambda shape, dtype, where: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    rows, bf16 = batch_sharding(mesh), jnp.bfloat16
    tau, valid = shape((), jnp.float32, replicated(mesh)), shape((batch,), bool, rows)
    if loss is image_text:
        return [shape((batch, EMBED), bf16, rows)] * 2 + [valid, tau]
    sides = [shape((batch, n, WIDTH), bf16, rows) for n in (REGIONS, WORDS)]
    return [*sides, shape((batch, WORDS), bool, rows), valid, tau]


def measure(loss, form, batch, mesh):
    """One line of the table; None where the compiler says that it does not fit."""
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(partial(loss, form), argnums=(0, 1)))
        inputs = arguments(loss, batch, mesh)
        flops = count_flops(jax.make_jaxpr(step)(*inputs).jaxpr, mesh.size) / mesh.size
        try:
            compiled = step.lower(*inputs).compile()
        except jax.errors.JaxRuntimeError as error:
            if "hbm" not in str(error).lower():
                raise
            return None
    traffic = count_traffic(compiled.as_text())
    kinds = ", ".join(f"{kind} x{n}" for kind, (n, _) in sorted(traffic.collectives.items()))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return temporary / MIB, flops, traffic.accessed, kinds or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v3:4x8")
    parser.add_argument("--batch", default="1024")
    parser.add_argument("--losses", default="grounding,image_text")
    args = parser.parse_args()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    mesh = make_mesh(devices=devices)
    print(f"{args.topology}: {len(devices)} cores of {devices[0].device_kind}; a core, forward and backward")
    print(
        "| loss | B | form | temporary MiB | GFLOP | GB accessed | collectives |\n|---|---|---|---|---|---|---|"
    )
    for name in args.losses.split(","):
        loss = {"grounding": grounding, "image_text": image_text}[name]
        for batch in map(int, args.batch.split(",")):
            forms = ["gather", "ring"]
            if loss is grounding and batch // 16 >= len(devices):
                forms.insert(0, "unsync")
            with jax.set_mesh(mesh):
                picked = pick(batch, AXES, *SIZES[name])[0]
            for form in forms:
                cells = [name, f"{batch:,}", form + " (picked)" * (form == picked)]
                found = measure(loss, form, batch, mesh)
                if found is None:
                    cells += ["does not fit", "", "", ""]
                else:
                    mib, flops, accessed, kinds = found
                    cells += [f"{mib:,.1f}", f"{flops / 1e9:,.1f}", f"{accessed / 1e9:,.2f}", kinds]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
