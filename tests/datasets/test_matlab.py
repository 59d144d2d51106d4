"""MATLAB files: what SciPy writes is read as SciPy reads it."""

import io
import struct

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from ovseg_jax.data.images import Encoded
from ovseg_jax.datasets.matlab import read_label_map
from ovseg_jax.errors import UserError


def written(variables: dict, **options: object) -> Encoded:
    out = io.BytesIO()
    savemat(out, variables, **options)
    return Encoded("a.mat", out.getvalue())


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", "u1 i1 u2 i2 u4 i4 u8 i8 f4 f8".split())
def test_a_variable_is_read_as_scipy_reads_it(kind, compressed):
    for seed, shape in enumerate(((1, 1), (1, 3), (3, 1), (5, 7), (40, 30))):
        values = np.random.default_rng(seed).integers(0, 128, shape).astype(kind)
        file = written({"other": "text", "LabelMap": values, "s": {"x": [1, 2]}}, do_compression=compressed)
        found = read_label_map(file, "LabelMap")
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, loadmat(io.BytesIO(file.data))["LabelMap"])


@pytest.mark.parametrize("compressed", [False, True])
def test_a_field_is_read_as_scipy_reads_it(compressed):
    inner = {"Segmentation": np.arange(6).reshape(2, 3), "a": np.zeros((0, 0)), "of": {"b": [[7, 8]]}}
    file = written({"GTcls": inner, "Segmentation": [[9]]}, do_compression=compressed)
    expected = loadmat(io.BytesIO(file.data))["GTcls"]["Segmentation"][0, 0]
    np.testing.assert_array_equal(read_label_map(file, "GTcls", "Segmentation"), expected)
    assert read_label_map(file, "GTcls", "of", "b").tolist() == [[7, 8]]
    assert read_label_map(file, "Segmentation").tolist() == [[9]]
    for path, message in (
        (("GTinst",), "it has no 'GTinst'"),
        (("GTcls", "x"), "it has no 'x'"),
        (("GTcls",), "not an array of numbers"),
        (("GTcls", "Segmentation", "x"), "the field 'x' is not in a structure of one element"),
        (("GTcls", "a"), r"'a' is an array of .* \(0, 0\), not a label map"),
    ):
        with pytest.raises(UserError, match=message):
            read_label_map(file, *path)


def test_the_other_byte_order():
    """The same file as a machine of that order writes it: each number with its bytes in reverse."""
    header = b"MATLAB 5.0".ljust(124) + struct.pack(">H", 0x0100) + b"MI"
    parts = [
        struct.pack(">IIII", 6, 8, 11, 0),  # an array of uint16
        struct.pack(">IIii", 5, 8, 2, 1),
        struct.pack(">I4s", (1 << 16) + 1, b"m"),
        struct.pack(">IHH", (4 << 16) + 4, 259, 1),
    ]
    body = b"".join(parts)
    file = Encoded("a.mat", header + struct.pack(">II", 14, len(body)) + body)
    assert loadmat(io.BytesIO(file.data))["m"].tolist() == [[259], [1]]
    assert read_label_map(file, "m").tolist() == [[259], [1]]


@pytest.mark.parametrize("data", [b"", bytes(200), b"\x89HDF\r\n\x1a\n" + bytes(200)])
def test_another_format_is_named(data):
    with pytest.raises(UserError, match=r"a.mat cannot be read: it is not a MATLAB file of version 5"):
        read_label_map(Encoded("a.mat", data), "LabelMap")
