"""The planner: counts against hand-made ones, and real compilations for TPUs that are not there."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ovseg_jax.configs import fcclip, pomp, umg_clip
from ovseg_jax.costs import plan as planner
from ovseg_jax.costs.flops import count_flops
from ovseg_jax.costs.plan import largest_batch, plan, search
from ovseg_jax.costs.roofline import CHIPS, report
from ovseg_jax.errors import UserError
from ovseg_jax.parallel.sharding import AXES, make_mesh
from ovseg_jax.plan import use_compiler_alone
from tests.extras import require

ROOT = Path(__file__).parents[2]


def flops(function, *shapes, devices=1):
    jaxpr = jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr
    return count_flops(jaxpr, devices)


def test_flops_of_products_and_convolutions():
    count = flops
    assert count(lambda a, b: a @ b, (3, 4), (4, 5)) == 2 * 3 * 4 * 5
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (7, 3, 4), (7, 4, 5)) == 7 * 2 * 3 * 4 * 5

    def conv(x, k, **kwargs):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs
        )

    assert count(conv, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)
    depthwise = lambda x, k: conv(x, k, feature_group_count=6)
    assert count(depthwise, (2, 8, 8, 6), (3, 3, 1, 6)) == 2 * (2 * 8 * 8 * 6) * (3 * 3)


def test_the_gradient_of_a_convolution_costs_twice_its_value():
    def loss(x, k):
        y = jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (y**2).sum()

    value = flops(loss, (2, 8, 8, 3), (2, 2, 3, 5))
    assert flops(jax.grad(loss, (0, 1)), (2, 8, 8, 3), (2, 2, 3, 5)) == pytest.approx(3 * value, rel=0.1)


def test_flops_of_loops_branches_and_shares():
    once = 2 * 4 * 4 * 4
    scan = lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=5)[0]
    assert flops(scan, (4, 4)) == 5 * once
    cond = lambda a: jax.lax.cond(a.sum() > 0, lambda a: a @ a @ a, lambda a: a @ a, a)
    assert flops(cond, (4, 4)) == once
    again = lambda a: jax.checkpoint(lambda a: jnp.sin(a @ a))(a).sum()
    assert flops(jax.grad(again), (4, 4)) == 4 * once  # forward, again, and two for the gradient
    with jax.set_mesh(make_mesh()):
        share = jax.shard_map(lambda a: a @ a.T, in_specs=P(AXES), out_specs=P(AXES))
        assert flops(share, (16, 3), devices=8) == 8 * 2 * 2 * 2 * 3


def test_a_refusal_of_the_compiler_becomes_a_plan():
    counted = dict(
        topology="v3:2x2", devices=8, batch_size=8, parameters=1, optimizer=1, batch=1, activations=1,
        capacity=16 * 2**30, flops=1e12, compute_seconds=0.016,
    )  # fmt: skip
    for text in (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.51G) exceeds "
        "available HBM (15.48G).",
        "Ran out of memory in memory space hbm. Used 16.51G of 15.48G hbm. Exceeded hbm capacity by 1.03G.",
    ):
        refused = planner._plan_that_exceeds(RuntimeError(text), counted)
        assert not refused.fits and abs(refused.over / 2**30 - 1.03) < 1e-6
        assert "DOES NOT FIT: 1.03 GiB too much" in report(refused)
    with pytest.raises(RuntimeError, match="another"):
        planner._plan_that_exceeds(RuntimeError("another error"), counted)


def command(*arguments):
    env = os.environ | {
        "XLA_FLAGS": "",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    args = [sys.executable, "-m", "ovseg_jax.plan", *arguments]
    return subprocess.run(args, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)


def plans(*arguments, code=0):
    done = command(*arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


TINY = "--config=tests/tiny.py"


def tiny(**changes):
    config = run_path(str(ROOT / "tests" / "tiny.py"))["get_config"]()
    config.update_from_flattened_dict(changes)
    return config


def test_gpus_by_count():
    one, two = (plan(tiny(), f"h100:{n}") for n in (1, 2))
    assert one.fits and one.devices == 1 and one.temporary is None and one.bound == "compute"
    assert two.flops == pytest.approx(one.flops / 2)
    assert two.parameters == one.parameters and two.activations == one.activations // 2
    spread = plan(tiny(**{"mesh.data": 1, "mesh.fsdp": 4}), "h100:4")
    assert one.parameters / 4 <= spread.parameters < one.parameters / 2


@pytest.mark.parametrize("shipped", [fcclip, umg_clip])
def test_a_head_on_a_frozen_clip_whose_names_stand_in_templates(shipped):
    config = shipped.get_config()
    found = plan(config, "h100:1", words=200)
    assert (
        found.batch_size == config.batch_size
        and found.flops > 0
        and found.parameters > found.optimizer / 2 > 0
    )


def exact(**changes):
    config = pomp.get_config("data=folder,data_dir=x,sample=0,cache=1")
    config.towers.image.depth = config.towers.text.layers = 2
    config.update_from_flattened_dict({"batch_size": 32, "data.views": 1, **changes})
    return config


def test_the_exact_softmax_takes_no_more_memory_for_twice_the_classes():
    one, two = (plan(exact(), "h100:1", classes=n) for n in (10_451, 20_902))
    assert two.flops > 1.9 * one.flops
    # The chunks' sums and what goes with the prompt are kept, never the chunks.
    assert two.activations < 1.1 * one.activations < 2**29
    assert plan(exact(**{"loss.sample": 1000}), "h100:1").flops < one.flops / 3


def test_the_largest_batch_fits_and_an_eighth_more_does_not():
    large = tiny(**{"data.image_size": 1024, "data.mask_stride": 4, "batch_size": 64})
    found = largest_batch(large, "h100:1")
    assert found.batch_size > 64 and found.fits and found.total * 1.15 > found.capacity


@pytest.mark.parametrize(
    ("most", "start"), [(1, 1), (1, 200), (2, 1), (9, 100), (101, 1), (101, 200), (3000, 1)]
)
def test_the_largest_batch_of_a_law_that_is_not_linear(start, most, monkeypatch):
    tried, config = [], tiny(batch_size=start, **{"loss.group": 1})
    some_plan = plan(config, "h100:1")._replace(parameters=500, optimizer=500, capacity=1000 + 10**6)

    def law(config, topology, **_):
        n = config.batch_size
        tried.append(n)
        total = 1000 + int((n / most) ** 1.5 * 10**6)
        return some_plan._replace(batch_size=n, total=total, fits=total <= 1000 + 10**6)

    monkeypatch.setattr(planner, "plan", law)
    found = largest_batch(config, "h100:1")
    assert found.batch_size <= most < found.batch_size + max(1, found.batch_size // 8) + 1
    assert len(tried) == len({*tried}) <= 10


def test_no_batch_fits(monkeypatch):
    monkeypatch.setitem(CHIPS, "h100", CHIPS["h100"]._replace(memory=1))
    assert largest_batch(tiny(batch_size=8, **{"loss.group": 2}), "h100:1") is None


def test_a_search_for_what_fits_in_prompt_tuning(monkeypatch):
    """Its towers can be computed again too; there is no `model`."""
    config = exact(batch_size=64)
    total = plan(config, "h100:2", classes=500).total
    monkeypatch.setitem(CHIPS, "h100", CHIPS["h100"]._replace(memory=int(total * 0.9)))
    tried = list(search(config, "h100:2", classes=500))
    assert tried[0][0] == "--config.towers.text.remat=all"
    assert "--config.mesh.fsdp=-1" in tried[1][0] or tried[0][1].fits


def test_a_search_tries_the_cheapest_first(monkeypatch):
    """Of OpenSeg what stands in a config of its model and its backbone, the model's first."""
    monkeypatch.setitem(CHIPS, "h100", CHIPS["h100"]._replace(memory=1))
    config = tiny()
    config.model.backbone = dict(name="resnet50", remat="none")
    model, backbone = "--config.model.remat", "--config.model.backbone.remat"
    changes = [change for change, _ in itertools.islice(search(config, "h100:1"), 4)]
    assert changes == [
        f"{model}=dots",
        f"{model}=dots {backbone}=dots",
        f"{model}=all {backbone}=dots",
        f"{model}=all {backbone}=all",
    ]


def test_what_cannot_be_planned():
    for topology in ("v3", "v9:2x2", "a100:8"):
        with pytest.raises(UserError, match=f"--topology={topology} is unknown"):
            plan(tiny(), topology)
    with pytest.raises(UserError, match="batch_size=4 must be a positive multiple of the 3 devices"):
        plan(tiny(), "h100:3")


def test_the_command():
    """What is asked for is printed, and what is wrong is one sentence."""
    given = ("--config.data.image_size=256", "--config.batch_size=4096")
    first, found = plans(TINY, "--topology=h100:1", "--largest_batch", *given)
    assert first["batch_size"] == 4096 < found["batch_size"]
    assert found["change"] == f"--config.batch_size={found['batch_size']}"
    done = command("--topology=h100:1")
    assert done.returncode == 1 and "--config=FILE.py is missing" in done.stderr


def test_a_step_compiled_for_a_tpu():
    require("libtpu")
    done = command(TINY, "--topology=v3:2x2", "--config.batch_size=8")
    assert done.returncode == 0, done.stderr
    for word in (
        "8 devices",
        "parameters",
        "optimiser",
        "temporary",
        "of 16.00: fits",
        "all-reduce",
        "bound by",
    ):
        assert word in done.stdout
    with mock.patch.dict(os.environ):
        use_compiler_alone()
        for topology in ("v4:2x2x1", "v6e:2x2"):
            p = plan(tiny(batch_size=8), topology)
            assert p.devices == 4 and p.temporary > 0 and p.total < p.capacity and p.accessed > 0


def test_what_does_not_fit_says_by_how_much_and_what_would():
    require("libtpu")
    # 1.3e9 parameters, four times with Adam. Without rematerialisation, two compilations more come first.
    wide = (TINY, "--topology=v5e:2x2", "--config.model.position_grid=9216", "--config.model.remat=all")
    refused, fits = plans(*wide, "--search")
    assert not refused["fits"] and refused["over"] > 2**30
    assert fits["fits"] and fits["change"] == "--config.mesh.data=1 --config.mesh.fsdp=-1"
