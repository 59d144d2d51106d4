"""Positions of the windows of a Swin Transformer, for Flax and for PyTorch."""

# Rules if one window covers a side of the map: "axis" (timm's classifiers): no shift along that axis, and windows as
# long as the map; "both" (the authors' classifiers and transformers' SwinModel): no shift along either axis, and
# windows as large as the shorter side; "always" (the authors' detectors and transformers' SwinBackbone): shifts and
# full windows everywhere.
RULES = ("axis", "both", "always")


def window_and_shift(
    height: int, width: int, window: int, shifted: bool, rule: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns sides of windows and shifts (down, right) for a map of height x width; `rule` is in `RULES`."""
    half = window // 2 if shifted else 0
    if rule == "always":
        return (window, window), (half, half)
    if rule == "both":
        shortest = min(height, width)
        if shortest <= window:
            return (shortest, shortest), (0, 0)
        return (window, window), (half, half)
    size = (min(window, height), min(window, width))
    return size, (half if height > window else 0, half if width > window else 0)
