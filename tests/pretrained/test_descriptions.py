"""Exported models with a wrong description."""

import json

import pytest

from ovseg_jax.errors import UserError
from tests.pretrained.damaged import export_tiny, segment


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
    path = export_tiny(tmp_path)
    config = json.loads(path.read_text())
    config["model"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"exported model .* cannot be read: "):
        segment(path)
