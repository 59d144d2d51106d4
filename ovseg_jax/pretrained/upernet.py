"""Names of published UPerNets, for `models.upernet.UPerNet`: transformers' UperNetForSemanticSegmentation."""

from typing import Any

from ovseg_jax.errors import UserError
from ovseg_jax.models.swin import Swin
from ovseg_jax.models.tap_pyramid import TapPyramid
from ovseg_jax.pretrained.rename import Rename, batch_norm, conv, inside, linear, pointwise
from ovseg_jax.pretrained.swin import from_hf_swin
from ovseg_jax.pretrained.vit import from_hf_vit


def from_hf_upernet(backbone: Any) -> list[Rename]:
    """Returns the renames of UperNetForSemanticSegmentation over a Swin, or over BEiT with `add_fpn` as a `TapPyramid`.

    Raises:
      UserError: no such UPerNet is published over that backbone.
    """
    renames = [*_backbone(backbone)]
    head, aux = r"decode_head\.", r"auxiliary_head\."
    for source, target in (
        (head + r"psp_modules\.(\d+)\.1", r"head/pool_\1"),
        (head + "bottleneck", "head/context"),
        (head + "fpn_bottleneck", "head/fusion"),
        *((rf"{head}lateral_convs\.{i}", f"head/lateral_c{i + 2}") for i in range(3)),
        *((rf"{head}fpn_convs\.{i}", f"head/output_c{i + 2}") for i in range(3)),
        (aux + r"convs\.0", "aux_head"),
    ):
        renames.append(Rename(rf"{source}\.conv\.weight", f"params/{target}/conv/kernel", conv))
        renames += batch_norm(rf"{source}\.batch_norm", f"{target}/norm")
    for source, target in ((head, "classifier"), (aux, "aux_classifier")):
        renames += linear(rf"{source}classifier", f"params/{target}", pointwise)
    return renames


def _backbone(backbone: Any) -> list[Rename]:
    if isinstance(backbone, Swin):
        return inside(from_hf_swin(backbone.heads, backbone=True), r"backbone\.", "backbone")
    if isinstance(backbone, TapPyramid):
        tower = [
            rule._replace(pattern=rf"(?:beit\.)?{rule.pattern}") for rule in from_hf_vit(backbone.tower.heads)
        ]
        own = []
        for source, target in (
            (r"fpn1\.(?:0|conv_transpose1)", "up_c2_0"),
            (r"fpn1\.(?:3|conv_transpose2)", "up_c2_1"),
            (r"fpn2(?:\.0)?", "up_c3"),
        ):
            own += linear(rf"(?:fpn\.)?{source}", f"params/{target}", conv)
        own += batch_norm(r"(?:fpn\.)?fpn1\.(?:1|normalization)", "norm_c2")
        return [*inside(own, r"backbone\.", "backbone"), *inside(tower, r"backbone\.", "backbone/tower")]
    raise UserError(f"no published UPerNet has the backbone {type(backbone).__name__}")
