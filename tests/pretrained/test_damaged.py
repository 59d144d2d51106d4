"""Damaged files of weights, by seed: each is read, or refused with one sentence."""

import json

import numpy as np
import pytest

from ovseg_jax.errors import UserError
from tests.pretrained.damaged import READERS

COUNT = 150


def mutant(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one to four faults: bits, other bytes, cuts, repeats, what lies in front, digits, brackets."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(len(out), 1)))
        end = at + int(rng.integers(1, 20))
        match rng.integers(0, 8):
            case 0 if out:
                out[at] ^= 1 << int(rng.integers(0, 8))
            case 1 if out:
                out[at] = int(rng.integers(0, 256))
            case 2:
                del out[at:end]
            case 3:
                out[at:at] = out[at:end]
            case 4:
                del out[at:]
            case 5:
                out[at:end] = rng.choice(
                    [b"-1", b"null", b"[]", b"{}", b"1e999", b"9" * 30, b'"', b"\\u0000", b"\xff"]
                )
            case 6:
                out[at:at] = rng.bytes(8)
            case 7:
                start = int(rng.integers(0, min(len(out), 64) + 1))  # headers matter most
                out[start : start + 1] = rng.bytes(1)
    return bytes(out)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_or_refused(kind, tmp_path):
    write, read = READERS[kind]
    path = write(tmp_path)
    read(path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for i in range(COUNT):
        data = b"" if i == 0 else mutant(whole, rng)
        path.write_bytes(data)
        try:
            read(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and path.parent.name in str(error), error
        except Exception as error:
            pytest.fail(f"mutant {i} of {kind}: {type(error).__name__}: {error}")
    assert refused > COUNT / 20
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError):
        read(path)


@pytest.mark.parametrize(
    "change",
    [
        dict(head_convs=10**30),
        dict(head_convs=10**6),
        dict(decoder_layers=10**5),
        dict(width=10**5),
        dict(width=1e400),
        dict(num_queries=10**30),
        dict(position_grid=-1),
        dict(decoder_heads=3),
        dict(decoder_heads=0),
        dict(mask_scale="1"),
        dict(mean=[0.5]),
        dict(mean=None),
        dict(backbone=3),
        dict(backbone=dict(kind="SmallBackbone", width=8, levels=10**30)),
        dict(backbone=dict(kind="EfficientNet", width=1.0, depth=1e30)),
        dict(backbone=dict(kind="Swin", depths=[10**9])),
        dict(backbone=dict(kind="SmallBackbone", height=3)),
    ],
    ids=str,
)
def test_an_exported_description_is_compared_before_anything_is_built(tmp_path, change):
    write, read = READERS["config.json of an exported model"]
    path = write(tmp_path)
    config = json.loads(path.read_text())
    config["model"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds no exported model: "):
        read(path)
