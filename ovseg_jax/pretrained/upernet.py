"""Names of published UPerNets, for `models.upernet.UPerNet`: transformers' UperNetForSemanticSegmentation."""

from typing import Any

from ovseg_jax.errors import UserError
from ovseg_jax.models.swin import Swin
from ovseg_jax.models.tap_pyramid import TapPyramid
from ovseg_jax.pretrained.rename import Rename, conv, dense, same
from ovseg_jax.pretrained.swin import from_hf_swin
from ovseg_jax.pretrained.vit import from_hf_vit

STATISTICS = r"\.num_batches_tracked"


def classifier(x: Any) -> Any:
    """Converts a 1x1 convolution [out in 1 1] to a dense kernel [in out]."""
    return dense(x[:, :, 0, 0])


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
        renames.append(Rename(rf"{source}classifier\.weight", f"params/{target}/kernel", classifier))
        renames.append(Rename(rf"{source}classifier\.bias", f"params/{target}/bias"))
    return renames


def _backbone(backbone: Any) -> list[Rename]:
    if isinstance(backbone, Swin):
        return _within(from_hf_swin(backbone.heads, backbone=True), "backbone")
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
            own.append(Rename(rf"(?:fpn\.)?{source}\.weight", f"params/{target}/kernel", conv))
            own.append(Rename(rf"(?:fpn\.)?{source}\.bias", f"params/{target}/bias"))
        own += batch_norm(r"(?:fpn\.)?fpn1\.(?:1|normalization)", "norm_c2")
        return [*_within(own, "backbone"), *_within(tower, "backbone", "backbone/tower")]
    raise UserError(f"no published UPerNet has the backbone {type(backbone).__name__}")


def _within(rules: list[Rename], source: str, target: str = "") -> list[Rename]:
    """Returns rules for the arrays of a part: `source.` before their names, and its name in our paths."""

    def moved(path: str) -> str:
        collection, _, rest = path.partition("/")
        return f"{collection}/{target or source}/{rest}" if path else ""

    return [Rename(rf"{source}\.(?:{rule.pattern})", moved(rule.target), rule.layout) for rule in rules]


def batch_norm(source: str, target: str) -> list[Rename]:
    """Returns the renames of a batch norm; PyTorch's counter of batches is ignored."""
    return [
        Rename(rf"{source}\.weight", f"params/{target}/scale", same),
        Rename(rf"{source}\.bias", f"params/{target}/bias", same),
        Rename(rf"{source}\.running_mean", f"batch_stats/{target}/mean", same),
        Rename(rf"{source}\.running_var", f"batch_stats/{target}/var", same),
        Rename(source + STATISTICS, ""),
    ]
