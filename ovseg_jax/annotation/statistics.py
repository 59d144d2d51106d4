"""Statistics of an annotated data set, as in papers/003: Tables 1, 11 and 12, Figure 6."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from etils import epath

from ovseg_jax.annotation.workflow import Record
from ovseg_jax.viz.curves import render
from ovseg_jax.viz.segments import palette

# Table 11: the names of areas, and the side of a square below which each is, in pixels.
AREAS = {"tiny": 20, "small": 40, "medium": 100, "large": 200, "huge": float("inf")}


class Statistics:
    """Sums over images."""

    def __init__(self) -> None:
        self.images = 0
        self.dropped: Counter[str] = Counter()
        self.areas: Counter[str] = Counter()
        self.categories: Counter[str] = Counter()
        self.captions: Counter[tuple[str, str]] = Counter()
        self.words: Counter[tuple[str, str]] = Counter()
        self.masks = 0
        self.stability = 0.0

    def add(self, record: Record, dropped: Mapping[str, int]) -> None:
        """Adds what is kept of an image, and how much was dropped."""
        self.images += 1
        self.dropped.update(dropped)
        self._count_captions("image", record["captions"])
        for region in record["regions"]:
            x0, y0, x1, y1 = region["bbox"]
            self.areas[area_name(float((x1 - x0) * (y1 - y0)))] += 1
            self.categories[region["label"]] += 1
            self._count_captions("region", region["captions"])
            if "segment" in region:
                self.masks += 1
                self.stability += region["stability"]

    def _count_captions(self, kind: str, captions: Any) -> None:
        for text, plug, *_ in captions:
            for key in ((kind, "overall"), (kind, plug)):
                self.captions[key] += 1
                self.words[key] += len(text.split())

    def result(self) -> dict[str, Any]:
        """Returns counts, shares and means as plain values."""
        regions = sum(self.areas.values())
        mean = lambda total, count: round(total / count, 4) if count else None
        words: dict[str, dict[str, float | None]] = {"image": {}, "region": {}}
        for (kind, plug), count in sorted(self.captions.items()):
            words[kind][plug] = mean(self.words[kind, plug], count)
        return {
            "images": self.images,
            "regions": regions,
            "categories": len(self.categories),
            "captions_per_image": mean(self.captions["image", "overall"], self.images),
            "captions_per_region": mean(self.captions["region", "overall"], regions),
            "region_areas": {name: mean(self.areas[name], regions) for name in AREAS},
            "caption_words": words,
            "things_with_masks": self.masks,
            "mean_stability": mean(self.stability, self.masks),
            "dropped": dict(self.dropped),
            "regions_by_category": dict(
                sorted(self.categories.items(), key=lambda item: (-item[1], item[0]))
            ),
        }


def area_name(area: float) -> str:
    """Returns the name of an area in Table 11."""
    return next(name for name, side in AREAS.items() if area < side**2)


def draw_statistics(found: Mapping[str, Any], path: epath.PathLike) -> None:
    """Draws the areas of regions, the lengths of captions and the distribution of categories.

    Args:
      found: see `Statistics.result`.
      path: the PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), dpi=110, facecolor="white", layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    first, second, third = palette(3) / 255
    shares = [100 * (share or 0) for share in found["region_areas"].values()]
    left.bar([*found["region_areas"]], shares, color=first)
    left.set(title="areas of regions (%)")
    lengths = {
        f"{kind}\n{plug.rpartition(':')[2]}": mean
        for kind, own in found["caption_words"].items()
        for plug, mean in own.items()
    }
    middle.bar([*lengths], [*lengths.values()], color=second)
    middle.set(title="words of a caption")
    counts = [*found["regions_by_category"].values()]
    right.plot(range(1, 1 + len(counts)), counts, color=third, marker="o" if len(counts) < 30 else None, ms=3)
    right.set(title="regions of a category, by its rank", xlabel="rank")
    if counts:
        right.set_yscale("log")
    for axes in (left, middle, right):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    render(figure, path)
