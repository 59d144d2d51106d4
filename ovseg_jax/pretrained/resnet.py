"""Names of published ResNets: torchvision's, which timm shares, transformers' and detectron2's."""

from ovseg_jax.pretrained.rename import Rename, batch_norm, conv


def from_torchvision_resnet() -> list[Rename]:
    """Returns the renames of torchvision's or timm's ResNet-50 or 101 (`layer1.0.conv1.weight`)."""
    block, ours = r"layer(\d)\.(\d+)", r"layer\1_\2"
    return [
        Rename(r"conv1\.weight", "params/conv1/kernel", conv),
        *batch_norm("bn1", "norm1"),
        Rename(rf"{block}\.conv(\d)\.weight", rf"params/{ours}/conv\3/kernel", conv),
        *batch_norm(rf"{block}\.bn(\d)", rf"{ours}/norm\3"),
        Rename(rf"{block}\.downsample\.0\.weight", f"params/{ours}/downsample_conv/kernel", conv),
        *batch_norm(rf"{block}\.downsample\.1", f"{ours}/downsample_norm"),
        Rename(r"fc\..*", ""),
    ]


def from_hf_resnet() -> list[Rename]:
    """Returns the renames of transformers' ResNetModel with bottlenecks, also inside of its classifier."""
    stem = r"(?:resnet\.)?embedder\.embedder"
    renames = [
        Rename(rf"{stem}\.convolution\.weight", "params/conv1/kernel", conv),
        *batch_norm(rf"{stem}\.normalization", "norm1"),
        Rename(r"classifier\..*", ""),
    ]
    # transformers counts stages and layers from 0, our names from 1.
    for stage in range(4):
        block, ours = rf"(?:resnet\.)?encoder\.stages\.{stage}\.layers\.(\d+)", rf"layer{stage + 1}_\1"
        parts = {rf"layer\.{i}": (f"conv{i + 1}", f"norm{i + 1}") for i in range(3)}
        parts["shortcut"] = ("downsample_conv", "downsample_norm")
        for theirs, (conv_name, norm_name) in parts.items():
            kernel = f"params/{ours}/{conv_name}/kernel"
            renames.append(Rename(rf"{block}\.{theirs}\.convolution\.weight", kernel, conv))
            renames += batch_norm(rf"{block}\.{theirs}\.normalization", f"{ours}/{norm_name}")
    return renames


def from_detectron2_resnet(prefix: str = "") -> list[Rename]:
    """Returns the renames of detectron2's ResNet with bottlenecks and a norm behind each convolution.

    Args:
      prefix: a regex before each name, such as `backbone\\.`.
    """
    renames = [
        Rename(rf"{prefix}stem\.conv1\.weight", "params/conv1/kernel", conv),
        *batch_norm(rf"{prefix}stem\.conv1\.norm", "norm1"),
    ]
    # Stages are counted as the levels of their maps.
    for stage in range(1, 5):
        block, ours = rf"{prefix}res{stage + 1}\.(\d+)", rf"layer{stage}_\1"
        parts = {f"conv{i}": (f"conv{i}", f"norm{i}") for i in range(1, 4)}
        parts["shortcut"] = ("downsample_conv", "downsample_norm")
        for theirs, (conv_name, norm_name) in parts.items():
            renames.append(Rename(rf"{block}\.{theirs}\.weight", f"params/{ours}/{conv_name}/kernel", conv))
            renames += batch_norm(rf"{block}\.{theirs}\.norm", f"{ours}/{norm_name}")
    return renames
