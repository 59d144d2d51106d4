"""The mesh and the rules."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ovseg_jax.errors import UserError
from ovseg_jax.parallel.sharding import (
    batch_sharding,
    check_batch_size,
    join_parts,
    leaf_sharding,
    make_mesh,
    put_batch,
    split_parts,
)


def test_minus_one_takes_what_is_left():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh({"fsdp": 4}).shape) == {"data": 2, "fsdp": 4}
    assert dict(make_mesh({"data": 1, "fsdp": -1}).shape) == {"data": 1, "fsdp": 8}


@pytest.mark.parametrize("shape", [{"data": 3}, {"data": 2, "fsdp": 2}, {"fsdp": 16}, {"data": 0, "fsdp": 8}])
def test_a_mesh_that_does_not_fit(shape):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(shape)


def test_an_unknown_axis():
    with pytest.raises(UserError, match=r"model.*data"):
        make_mesh({"model": 2})


def test_a_batch_is_cut_in_parts_where_it_lies():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    x = put_batch({"x": np.arange(32)}, mesh)["x"]
    with jax.set_mesh(mesh):
        parts = jax.jit(lambda x: split_parts(x, 2))(x)
        again = jax.jit(lambda x: join_parts(split_parts(x, 2)))(x)
        text = jax.jit(lambda x: split_parts(x, 2)).lower(x).compile().as_text()
    np.testing.assert_array_equal(parts, np.arange(32).reshape(16, 2).T)
    np.testing.assert_array_equal(again, x)
    assert again.sharding == x.sharding
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    with pytest.raises(UserError, match="the 8 devices times accumulate=3"):
        check_batch_size(32, mesh, parts=3)
    with pytest.raises(UserError, match="accumulate=0"):
        check_batch_size(32, mesh, parts=0)


def test_the_batch_is_split_over_both_axes():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    image = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
    batch = put_batch({"image": image, "example_mask": np.ones(16, bool)}, mesh)
    assert batch["image"].dtype == np.uint8 and batch["image"].sharding == batch_sharding(mesh)
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["image"], image)


def test_rules():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    rules = (("^text/", "replicate"), (".*", "fsdp"))

    def spec(path, shape):
        return leaf_sharding(path, shape, mesh, rules).spec

    assert spec("image/kernel", (3, 3, 8, 16)) == PartitionSpec(None, None, None, "fsdp")
    assert spec("image/kernel", (16, 7)) == PartitionSpec("fsdp")
    assert spec("image/kernel", (6, 8, 7)) == PartitionSpec(None, "fsdp")
    assert spec("image/bias", (6,)) == PartitionSpec()
    assert spec("temperature", ()) == PartitionSpec()
    assert spec("text/table", (16, 16)) == PartitionSpec()
    assert leaf_sharding("a", (16,), make_mesh(), rules).spec == PartitionSpec()
    with pytest.raises(UserError, match="diagonal"):
        leaf_sharding("a", (16,), mesh, ((".*", "diagonal"),))
    assert len(jax.devices()) == 8
