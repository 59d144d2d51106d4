"""The shapes of EfficientNet-B0 to B7 (Tan and Le 2019), for Flax and for PyTorch."""

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
}


def round_channels(channels: int, width: float) -> int:
    """Scales channels and rounds to a multiple of 8, but never below 90% of the scaled number."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def round_blocks(blocks: int, depth: float) -> int:
    """Scales a number of blocks, rounding up."""
    return math.ceil(depth * blocks)
