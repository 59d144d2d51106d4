"""The shapes of EfficientNet-B0 to B8 (Tan and Le 2019) and Lite0 to Lite4, for Flax and for PyTorch."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Stage:
    """A sequence of blocks of one kind, only the first with the stride; numbers are those of B0, before scaling."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    channels: int


# Table 1 of the paper, rows 2 to 8.
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32

# (width, depth) multipliers.
SCALING = {
    "efficientnet_b0": (1.0, 1.0),
    "efficientnet_b1": (1.0, 1.1),
    "efficientnet_b2": (1.1, 1.2),
    "efficientnet_b3": (1.2, 1.4),
    "efficientnet_b4": (1.4, 1.8),
    "efficientnet_b5": (1.6, 2.2),
    "efficientnet_b6": (1.8, 2.6),
    "efficientnet_b7": (2.0, 3.1),
    "efficientnet_b8": (2.2, 3.6),
}
# tensorflow/tpu, models/official/efficientnet/lite.
LITE = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
    "efficientnet_lite3": (1.2, 1.4),
    "efficientnet_lite4": (1.4, 1.8),
}


def round_channels(channels: int, width: float) -> int:
    """Scales channels and rounds to a multiple of 8, but never below 90% of the scaled number."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def round_blocks(blocks: int, depth: float) -> int:
    """Scales a number of blocks, rounding up."""
    return math.ceil(depth * blocks)


def stage_blocks(depth: float, lite: bool) -> list[int]:
    """Returns the number of blocks of each stage; a Lite does not scale its first and its last stage."""
    scaled = [round_blocks(stage.blocks, depth) for stage in STAGES]
    return [STAGES[0].blocks, *scaled[1:-1], STAGES[-1].blocks] if lite else scaled


def stem_channels(width: float, lite: bool) -> int:
    """Returns the channels of the stem, which a Lite does not scale."""
    return STEM_CHANNELS if lite else round_channels(STEM_CHANNELS, width)
