"""Traffic counted in compiled programs: against the compiler's own count where there is no loop, times turns where."""

import jax
import jax.numpy as jnp
import pytest
from extras import require
from jax.sharding import PartitionSpec as P

from ovseg_jax.costs.hlo import count_traffic
from ovseg_jax.parallel.sharding import AXES, make_mesh


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jnp.zeros(shape) for shape in shapes)).compile()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: jnp.sin(x @ y) + x,
        lambda x, y: (x @ y).sum() * x,
        lambda x, y: jax.lax.dynamic_update_slice(x, y[:4], (3, 0)) + 1,
        lambda x, y: jax.nn.softmax(x @ y) @ y,
    ],
)
def test_without_loops_it_is_the_compilers_count(function):
    program = compiled(function, (64, 64), (64, 64))
    expected = program.cost_analysis()["bytes accessed"]
    assert count_traffic(program.as_text()).accessed == pytest.approx(expected, rel=0.05)


def test_a_loop_counts_as_often_as_it_runs():
    loop = lambda n: lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c @ x), None), x, None, length=n)[0]
    ten, thirty = (count_traffic(compiled(loop(n), (64, 64)).as_text()).accessed for n in (10, 30))
    product = 3 * 64 * 64 * 4
    assert 20 * product < thirty - ten < 20 * 2 * product


def test_slices_of_what_a_loop_goes_through_count_as_slices():
    cumulative = lambda xs: jax.lax.scan(lambda c, x: (c + x, jnp.cos(c)), xs[0], xs)[1]
    rows = 400
    accessed = count_traffic(compiled(cumulative, (rows, 256)).as_text()).accessed
    assert (
        rows * 256 * 4 * 3 < accessed < rows * 256 * 4 * 12
    )  # the whole array in every turn would be 400 times that


def test_collectives_in_a_loop():
    def ring(x):
        pass_on = lambda x, _: (jax.lax.ppermute(x, AXES, [(i, (i + 1) % 8) for i in range(8)]) * 2, None)
        return jax.lax.scan(pass_on, x, None, length=8)[0]

    with jax.set_mesh(make_mesh()):
        program = compiled(jax.shard_map(ring, in_specs=P(AXES), out_specs=P(AXES)), (16, 32))
    assert count_traffic(program.as_text()).collectives == {"collective-permute": (8, 8 * 2 * 32 * 4)}


def test_a_program_of_a_tpu():
    """As the TPU's compiler writes: layouts with tiles, asynchronous pairs, the chip's own memory, conditions."""
    text = """HloModule m
%cond (p.1: (s32[], f32[8,128])) -> pred[] {
  %constant.1 = s32[]{:T(256)} constant(6)
  %p.1 = (s32[]{:T(256)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(256)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(1024)} compare(%i, %constant.1), direction=LT
}

%body (p.2: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.2 = (s32[]{:T(256)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p.2), index=1
  %start = (f32[8,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) all-gather-start(%x), dimensions={0}
  %done = f32[64,128]{1,0:T(8,128)} all-gather-done(%start)
  %fast = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} convert(%done)
  %y = f32[8,128]{1,0:T(8,128)} fusion(%fast), kind=kLoop, calls=%unknown
  %i = s32[]{:T(256)} get-tuple-element(%p.2), index=0
  ROOT %out = (s32[]{:T(256)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %y)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(256)} constant(0)
  %start.1 = (s32[]{:T(256)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %a)
  %loop = (s32[]{:T(256)}, f32[8,128]{1,0:T(8,128)}) while(%start.1), condition=%cond, body=%body
  %sum = (f32[8]{0}, f32[4,2]{1,0}) all-reduce(%a, %a), to_apply=%add
  ROOT %r = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""
    traffic = count_traffic(text)
    assert traffic.collectives == {"all-gather": (6, 6 * 64 * 128 * 4), "all-reduce": (1, 64)}
    x, gathered = 8 * 128 * 4, 64 * 128 * 4
    turn = (
        (x + gathered) + gathered + x + 2 * 4 + 1
    )  # gather, convert into the chip, fusion out of it, compare
    assert traffic.accessed == 6 * turn + 64 + 2 * x


def test_a_conditional_counts_by_its_false_branch():
    branch = (
        "%{} (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT %r = f32[8]{{0}} {}(%p)\n}}\n"
    )
    rest = (
        "ENTRY %main (c: pred[], x: f32[8]) -> f32[8] {{\n  %c = pred[] parameter(0)\n  %x = f32[8]{{0}} parameter(1)\n"
        "  ROOT %r = f32[8]{{0}} conditional(%c, %x, %x), {}\n}}\n"
    )
    for called in (
        "true_computation=%yes, false_computation=%no",
        "branch_computations={%no, %yes}",
    ):
        text = branch.format("no", "copy") + branch.format("yes", "parameter") + rest.format(called)
        assert count_traffic(text).accessed == 2 * 8 * 4


def test_the_compilers_count_for_a_tpu():
    require("libtpu")
    from jax.experimental import topologies

    from ovseg_jax import plan  # asks for the compiler, not for a TPU

    del plan
    devices = topologies.get_topology_desc(topology_name="v3:2x2", platform="tpu").devices
    with jax.set_mesh(make_mesh(devices=devices)):
        x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
        program = jax.jit(lambda x, y: jax.nn.softmax(jnp.sin(x @ y.T)) @ y).lower(x, x).compile()
    expected = program.cost_analysis()["bytes accessed"]
    assert count_traffic(program.as_text()).accessed == pytest.approx(expected, rel=0.1)
