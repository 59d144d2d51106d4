"""big_vision's npz: every spelling of it ends in the same parameters, and what we write, it could have written."""

import ml_dtypes
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.big_vision import read_big_vision, to_loop, to_scan, write_big_vision

RNG = np.random.default_rng(0)
LOOP = {
    "embedding/kernel": RNG.normal(size=(2, 2, 3, 4)).astype(np.float32),
    "pos_embedding": RNG.normal(size=(1, 9, 4)).astype(ml_dtypes.bfloat16),
    **{
        f"Transformer/encoderblock_{i}/MlpBlock_0/Dense_{j}/kernel": RNG.normal(size=(4, 4)).astype(
            np.float32
        )
        for i in range(11)
        for j in range(2)
    },
}
EXPECTED = {f"params/{k}": v for k, v in LOOP.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("prefix", ["params/", "opt/target/", ""])
def test_all_spellings_are_one(tmp_path, prefix, scan):
    arrays = to_scan(LOOP) if scan else LOOP
    assert scan == ("Transformer/encoderblock/MlpBlock_0/Dense_0/kernel" in arrays)
    saved = {prefix + k: v.view("V2") if v.dtype == ml_dtypes.bfloat16 else v for k, v in arrays.items()}
    np.savez(tmp_path / "w.npz", **saved)
    assert_same(read_big_vision(tmp_path / "w.npz"), EXPECTED)
    np.savez(tmp_path / "two.npz", **{prefix + "img/" + k.removeprefix(prefix): v for k, v in saved.items()})
    assert_same(read_big_vision(tmp_path / "two.npz", "img"), EXPECTED)


def test_the_oldest_name_of_the_positions(tmp_path):
    old = {k.replace("pos_embedding", "Transformer/posembed_input/pos_embedding"): v for k, v in LOOP.items()}
    np.savez(tmp_path / "w.npz", **old)
    assert_same(read_big_vision(tmp_path / "w.npz"), EXPECTED)


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_written_is_read_again(tmp_path, scan):
    two = {f"params/img/{k}": v for k, v in LOOP.items()} | {"params/t": np.float32([2.3])}
    write_big_vision(tmp_path / "w.npz", two, scan=scan)
    with np.load(tmp_path / "w.npz") as file:
        stacked = [k for k in file if "encoderblock/" in k]
        assert len(stacked) == (2 if scan else 0)
    assert_same(read_big_vision(tmp_path / "w.npz"), two)
    assert_same(read_big_vision(tmp_path / "w.npz", "img"), EXPECTED)


def test_stacks_keep_their_order():
    assert_same(to_loop(to_scan(LOOP)), LOOP)  # eleven blocks: 10 comes behind 9, not behind 1


def test_a_missing_tower_is_named(tmp_path):
    write_big_vision(tmp_path / "one.npz", EXPECTED)
    assert_same(read_big_vision(tmp_path / "one.npz", "txt"), EXPECTED)
    write_big_vision(tmp_path / "w.npz", {f"params/img/{k}": v for k, v in LOOP.items()})
    with pytest.raises(UserError, match=r"w.npz has no tower 'txt'"):
        read_big_vision(tmp_path / "w.npz", "txt")
