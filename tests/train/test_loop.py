"""The loop in this process: order, records, resume, meshes, bad numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import DIM, CountingEvaluator, LinearMethod, make_batches, make_config

from ovseg_jax.errors import UserError
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.train.checkpoints import Checkpoints, load_variables, read_run, write_config
from ovseg_jax.train.loop import fit
from ovseg_jax.train.metrics import read_metrics, series
from ovseg_jax.train.optimizer import make_optimizer
from ovseg_jax.train.state import abstract_variables, create_state, state_shardings


def run(workdir, evaluators=(), method=None, mesh=None, **changes):
    config = make_config(**changes)
    mesh = mesh or make_mesh(config.mesh)
    return fit(config, workdir, method or LinearMethod(), make_batches(config), evaluators, mesh)


def leaves(result):
    return [np.asarray(x) for x in jax.tree.leaves((result.state.variables, result.state.opt_state))]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_it_learns_logs_evaluates_and_saves(tmp_path):
    evaluator = CountingEvaluator(every=5)
    result = run(tmp_path, [evaluator], steps=60)
    steps, losses = series(result.records, "loss")
    assert steps == list(range(2, 61, 2))
    assert losses[-1] < 0.5 * losses[0]
    assert evaluator.runs == 12
    assert series(result.records, "validation/norm")[0] == list(range(5, 61, 5))
    assert read_metrics(tmp_path) == result.records
    assert all("never" not in record for record in result.records)  # Counted nothing, so it has no mean.
    assert {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()} == {"55", "60"}
    assert result.images_per_second > 0 and not result.stopped


def test_a_step_is_compiled_once_and_small_arrays_are_saved_by_no_program(tmp_path, caplog):
    class Weak(LinearMethod):
        def init(self, rng):
            variables = super().init(rng)
            variables["params"]["layer"]["bias"] = jnp.full(DIM, 0.5)
            assert variables["params"]["layer"]["bias"].weak_type
            return variables

    with jax.log_compiles():
        run(tmp_path, method=Weak(), steps=10)
    compiled = [m.split()[1] for m in caplog.messages if m.startswith("Compiling jit(")]
    assert compiled.count("jit(step)") == 1
    assert "jit(slice)" not in compiled


def test_a_run_in_two_parts_equals_one_run(tmp_path):
    # Constant rate: a cosine over 12 steps is not the first part of one over 20.
    optimizer = dict(schedule="constant", warmup_steps=0)
    config = make_config()
    config.optimizer.update(optimizer)
    whole = run(tmp_path / "one", optimizer=config.optimizer)
    run(tmp_path / "two", optimizer=config.optimizer, steps=12)
    second = run(tmp_path / "two", optimizer=config.optimizer)
    assert second.started == 12
    assert_same(leaves(whole), leaves(second))
    assert series(second.records, "loss") == series(whole.records, "loss")


def test_the_first_record_after_a_restart_is_of_as_many_steps(tmp_path):
    """The checkpoint is in the middle of what a record is the mean of."""
    optimizer = dict(make_config().optimizer, schedule="constant", warmup_steps=0)
    whole = run(tmp_path / "one", optimizer=optimizer, log_every=8, steps=16)
    run(tmp_path / "two", optimizer=optimizer, log_every=8, steps=13)
    second = run(tmp_path / "two", optimizer=optimizer, log_every=8, steps=16)
    assert second.started == 13
    for name in ("loss", "error", "grad_norm"):
        assert series(second.records, name) == series(whole.records, name)
        assert series(whole.records, name)[0] == [8, 16]


def test_records_beyond_the_checkpoint_are_dropped(tmp_path):
    run(tmp_path, steps=10)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 12, "loss": 1.0}\n{"step": 14, "lo')
    evaluator = CountingEvaluator(every=5)
    result = run(tmp_path, [evaluator], steps=14)
    steps, _ = series(result.records, "loss")
    assert steps == [2, 4, 6, 8, 10, 12, 14]
    # Step 10 was never evaluated, so that is made up for; a second start does not evaluate it again.
    assert series(result.records, "validation/norm")[0] == [10]
    assert run(tmp_path, [evaluator], steps=14).records == result.records
    assert evaluator.runs == 1


def test_one_and_eight_devices_agree(tmp_path):
    curves = {}
    for data, fsdp in [(1, 1), (8, 1), (2, 4), (1, 8)]:
        mesh = make_mesh({"data": data, "fsdp": fsdp}, jax.devices()[: data * fsdp])
        result = run(tmp_path / f"{data}x{fsdp}", mesh=mesh, steps=12, checkpoint=dict(every=0, keep=1))
        curves[data, fsdp] = series(result.records, "loss")[1]
        kernel = result.state.params["layer"]["kernel"]
        assert len(kernel.sharding.device_set) == data * fsdp
        assert kernel.addressable_shards[0].data.size == kernel.size // fsdp
        if fsdp > 1:  # The optimiser's moments are spread as their parameter is.
            moments = [x for x in jax.tree.leaves(result.state.opt_state) if x.shape == kernel.shape]
            assert moments and all(x.sharding == kernel.sharding for x in moments)
    for losses in curves.values():
        np.testing.assert_allclose(losses, curves[1, 1], rtol=1e-5)


def test_a_checkpoint_restores_on_another_mesh(tmp_path):
    eight = run(tmp_path, mesh=make_mesh({"data": 2, "fsdp": 4}), steps=10)
    for shape in ({"data": 1, "fsdp": 1}, {"data": 2, "fsdp": 2}):
        devices = jax.devices()[: shape["data"] * shape["fsdp"]]
        other = run(tmp_path, mesh=make_mesh(shape, devices), steps=10)
        assert other.started == 10
        assert_same(leaves(eight), leaves(other))
        assert other.state.params["layer"]["kernel"].sharding.device_set == set(devices)


def test_a_profile_of_chosen_steps(tmp_path):
    run(tmp_path, steps=6, profile="2:4")
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
    run(tmp_path / "none", steps=6, profile="7:9")
    assert not (tmp_path / "none" / "profile").exists()
    for wrong in ("5", "5:5", "a:b"):
        with pytest.raises(UserError, match="is not FIRST:STOP"):
            run(tmp_path, steps=6, profile=wrong)


def test_a_nan_stops_and_is_never_saved(tmp_path):
    # Step 10 would be saved after it, and step 9 is where it happens.
    with pytest.raises(UserError, match=r"stopped at step 9, where error, loss is not finite"):
        run(tmp_path, method=LinearMethod(bad_step=9))
    with Closing(Checkpoints(tmp_path, every=5, keep=2)) as checkpoints:
        assert checkpoints.latest_step() == 5
    write_config(tmp_path, make_config())
    variables, step = load_variables(tmp_path)
    assert step == 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))


def test_a_checkpoint_of_another_config_names_what_differs(tmp_path):
    run(tmp_path, steps=5)

    class Other(LinearMethod):
        def init(self, rng):
            variables = super().init(rng)
            params = variables["params"]
            params["layer"]["kernel"] = params["layer"]["kernel"][:, :8]
            params["head"] = {"kernel": params.pop("tower")["kernel"]}
            return variables

        def loss(self, variables, batch, rng):
            raise AssertionError("never reached")

    with pytest.raises(UserError) as error:
        run(tmp_path, method=Other(), steps=10)
    message = str(error.value)
    assert "lacks params/head/kernel" in message and "has params/tower/kernel" in message
    assert "params/layer/kernel (16, 16) there, (16, 8) here" in message


def test_variables_for_inference(tmp_path):
    result = run(tmp_path, steps=10)
    (tmp_path / "file").touch()
    for name, reason in {
        "": "config.json is missing",
        "no": "it does not exist",
        "file": "it is a file",
    }.items():
        with pytest.raises(UserError, match=f"{tmp_path / name} holds no run: {reason}"):
            read_run(tmp_path / name)
    write_config(tmp_path, make_config(steps=10))
    variables, step = load_variables(tmp_path)
    assert step == 10 and read_run(tmp_path).steps == 10
    assert isinstance(variables["params"]["layer"]["kernel"], np.ndarray)
    assert_same(jax.tree.leaves(variables), jax.tree.leaves(jax.device_get(result.state.variables)))
    mesh = make_mesh({"data": 1, "fsdp": 8})
    sharded, step = load_variables(tmp_path, 5, mesh=mesh)
    assert step == 5 and sharded["params"]["layer"]["kernel"].addressable_shards[0].data.shape == (2, 16)
    with pytest.raises(UserError, match=r"no checkpoint of step 7; it has \[5, 10\]"):
        load_variables(tmp_path, 7)


def test_what_is_saved_does_not_move_while_training_goes_on(tmp_path):
    # The steps after a save donate the very buffers that the background write reads.
    seen = {}

    class Spy(CountingEvaluator):
        def run(self, variables):
            seen[len(seen) + 1] = jax.tree.map(lambda x: np.array(x), jax.device_get(variables))
            return {}

    run(tmp_path, [Spy(every=1)], steps=12, checkpoint=dict(every=1, keep=12))
    write_config(tmp_path, make_config())
    for step, variables in seen.items():
        assert_same(jax.tree.leaves(variables), jax.tree.leaves(load_variables(tmp_path, step)[0]))


def test_frozen_parameters_stay_and_have_no_state(tmp_path):
    optimizer = make_config().optimizer
    optimizer.update(dict(multipliers=(("^tower/", None),), clip_norm=1.0))
    result = run(tmp_path, optimizer=optimizer, steps=4)
    start = jax.jit(LinearMethod().init)(jax.random.key(3))["params"]
    np.testing.assert_array_equal(result.state.params["tower"]["kernel"], start["tower"]["kernel"])
    assert np.abs(result.state.params["layer"]["kernel"] - start["layer"]["kernel"]).max() > 0
    moments = [x for x in jax.tree.leaves(result.state.opt_state) if x.shape == (16, 16)]
    assert len(moments) == 2  # Adam's two, of the one matrix that is trained.


def test_a_batch_that_devices_cannot_share(tmp_path):
    with pytest.raises(UserError, match=r"batch_size=6 must be a positive multiple of the 8 devices"):
        run(tmp_path, batch_size=6)


def test_metrics_lines_are_json_objects_with_a_step(tmp_path):
    run(tmp_path, [CountingEvaluator()], steps=6)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line)["step"], int)


class Closing:
    def __init__(self, thing):
        self.thing = thing

    def __enter__(self):
        return self.thing

    def __exit__(self, *_):
        self.thing.close()


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 1, "fsdp": 8}])
def test_published_weights_are_where_a_run_starts_and_only_there(tmp_path, shape):
    kernel, asked = np.full((DIM, DIM), 0.25, np.float64), []

    class Pretrained(LinearMethod):
        def pretrained(self):
            asked.append(1)
            return {"params": {"tower": {"kernel": kernel}}, "batch_stats": {"mean": np.full(DIM, 2.0)}}

    plain = run(tmp_path / "plain", steps=0, mesh=make_mesh(shape))
    first = run(tmp_path / "own", method=Pretrained(), steps=0, mesh=make_mesh(shape))
    np.testing.assert_array_equal(first.state.params["tower"]["kernel"], np.float32(kernel))
    np.testing.assert_array_equal(first.state.model_state["batch_stats"]["mean"], np.full(DIM, 2, np.float32))
    # XLA leaves out what is not wanted, and may round the rest otherwise.
    np.testing.assert_allclose(
        first.state.params["layer"]["kernel"], plain.state.params["layer"]["kernel"], rtol=1e-6
    )
    shardings = lambda result: jax.tree.map(lambda x: x.sharding, result.state)
    assert shardings(first) == shardings(plain)
    moved = run(tmp_path / "own", method=Pretrained(), steps=5, mesh=make_mesh(shape))
    assert moved.started == 0 and len(asked) == 1


def test_what_is_given_is_not_drawn():
    drawn = []

    class Slow(LinearMethod):
        def init(self, rng):
            variables = super().init(rng)
            tower = variables["params"]["tower"]["kernel"]
            draw = lambda: drawn.append(1) or np.zeros(tower.shape, tower.dtype)
            return variables | {
                "params": variables["params"] | {"tower": {"kernel": jax.pure_callback(draw, tower)}}
            }

    mesh, method = make_mesh({"data": 8}), Slow()
    with jax.set_mesh(mesh):
        variables = abstract_variables(method, 0)
        optimizer = make_optimizer(make_config().optimizer, variables["params"], 1, ())
        shardings = state_shardings(optimizer, variables, mesh)
        given = {"params": {"tower": {"kernel": np.full((DIM, DIM), 0.5)}}}
        state = jax.block_until_ready(create_state(method, optimizer, 0, shardings, given))
        np.testing.assert_array_equal(state.params["tower"]["kernel"], given["params"]["tower"]["kernel"])
        assert not drawn
        jax.block_until_ready(create_state(method, optimizer, 0, shardings))
        assert drawn
        wrong = {"params": {"tower": {"kernel": np.zeros((2, DIM))}}}
        with pytest.raises(ValueError, match=r"params/tower/kernel has the shape \(2, 16\), not \(16, 16\)"):
            create_state(method, optimizer, 0, shardings, wrong)


def test_averaged_parameters(tmp_path):
    """They follow the formula, are what is evaluated, and go through a checkpoint to a restart and to inference."""

    class Remember(CountingEvaluator):
        def run(self, variables):
            seen.append(jax.device_get(variables["params"]))
            return {}

    def changes(ema, steps=6):
        return dict(optimizer=dict(make_config().optimizer, ema=ema, schedule="constant"), steps=steps)

    seen = []
    raw = run(tmp_path / "raw", [Remember(every=1)], **changes(0.0))
    expected, averages = LinearMethod().init(jax.random.key(3))["params"], []
    for t, params in enumerate(seen):
        share = min(0.3, (1 + t) / (10 + t))
        expected = jax.tree.map(lambda a, p, s=share: s * a + (1 - s) * p, expected, params)
        averages.append(expected)

    seen = []
    run(tmp_path / "two", [Remember(every=1)], **changes(0.3, steps=3))
    whole = run(tmp_path / "two", [Remember(every=1)], **changes(0.3))
    assert whole.started == 3 and len(seen) == 7
    assert_same(
        *map(jax.tree.leaves, (seen[2], seen.pop(3)))
    )  # What was evaluated before it stopped, and after.
    for ours, theirs in zip(seen, averages, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, theirs)
    assert_same(leaves(whole), leaves(raw))

    write_config(tmp_path / "two", make_config())
    for averaged, params in ((True, whole.state.average), (False, whole.state.params)):
        variables = load_variables(tmp_path / "two", averaged=averaged)[0]
        assert_same(jax.tree.leaves(variables["params"]), jax.tree.leaves(jax.device_get(params)))
    with pytest.raises(UserError, match=r"ema=1.0 is not in \[0, 1\)"):
        run(tmp_path / "bad", **changes(1.0))
