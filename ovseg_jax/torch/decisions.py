"""Decisions that separate objects, as `panoptic` and `instances` of `ovseg_jax/decisions/rules.py`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ovseg_jax.reading import kind_and_settings

STRIP = 64  # rows of an image whose masks are upsampled at once


class Segment(NamedTuple):
    """A segment of an image, as `ovseg_jax.inference.result.Segment`.

    Attributes:
      category: index into the requested classes.
      score: of its category; with `instances`, times the mean of its mask.
      isthing: whether the category is countable.
      instance: its number among the segments of a countable category, from 1; 0 for others.
      area: its number of pixels.
      mask: bool [H W].
    """

    category: int
    score: float
    isthing: bool
    instance: int
    area: int
    mask: np.ndarray


class Scored(NamedTuple):
    """The scores of one image's proposals.

    Attributes:
      classes: [K N], of each class for each proposal.
      void: [N], of "no object", or None.
      isthing: [K], whether a class is countable.
      maps: [N h w], mask logits.
      down, across: [H h] and [W w], see `segmenter.upsampling`.
    """

    classes: Tensor
    void: Tensor | None
    isthing: Tensor
    maps: Tensor
    down: Tensor
    across: Tensor

    def strips(self) -> Iterator[Tensor]:
        """Yields the mask logits [N r W] of some rows of the image after those of others."""
        for rows in self.down.split(STRIP):
            yield torch.einsum("rh,nhw,cw->nrc", rows, self.maps, self.across)


Decided = tuple[np.ndarray, np.ndarray, tuple[Segment, ...]]  # label map, confidence, segments


def panoptic(scored: Scored, object_threshold: float = 0.0, overlap_threshold: float = 0.8) -> Decided:
    """Gives every pixel to one proposal, see `decisions.rules.Panoptic`."""
    score, category = scored.classes.max(0)
    real = score > object_threshold
    if scored.void is not None:
        real &= score >= scored.void
    count, places, values = len(score), [], []
    half, own, both = (torch.zeros(count, dtype=torch.long, device=score.device) for _ in range(3))
    for x in scored.strips():
        mask = x.sigmoid()
        place = torch.where(real[:, None, None], score[:, None, None] * mask, -torch.inf).argmax(0)
        value = mask.gather(0, place[None])[0]
        half += (mask >= 0.5).sum((1, 2))
        own += torch.bincount(place.ravel(), minlength=count)
        both += torch.bincount(place[value >= 0.5], minlength=count)
        places.append(place)
        values.append(value)
    place, value = torch.cat(places), torch.cat(values)
    kept = real & (both > 0) & (own >= overlap_threshold * half)
    found = kept[place] & (value >= 0.5)
    label_map = torch.where(found, category[place], -1).int().cpu().numpy()
    confidence = torch.where(found, score[place] * value, 0).cpu().numpy()
    masks: dict[Any, tuple[int, float, np.ndarray]] = {}
    for n in kept.nonzero()[:, 0].tolist():
        k = int(category[n])
        mask = (found & (place == n)).cpu().numpy()
        key = ("thing", n) if scored.isthing[k] else ("stuff", k)
        before = masks.get(key)
        masks[key] = (k, float(score[n]), mask) if before is None else (k, before[1], before[2] | mask)
    return label_map, confidence, segments(scored, list(masks.values()))


def instances(scored: Scored, top: int = 100) -> Decided:
    """Returns the best pairs of a proposal and a countable class, see `decisions.rules.Instances`."""
    strips = [(x > 0, torch.where(x > 0, x.sigmoid(), 0).sum((1, 2))) for x in scored.strips()]
    masks, total = torch.cat([mask for mask, _ in strips], 1), torch.stack([x for _, x in strips]).sum(0)
    area = masks.sum((1, 2))
    scores = torch.where(scored.isthing[:, None], scored.classes, -torch.inf)
    best, at = (x[:top] for x in scores.ravel().sort(descending=True, stable=True))
    category, place = torch.div(at, scores.shape[1], rounding_mode="floor"), at % scores.shape[1]
    best = torch.where(best > -torch.inf, best * (total / (area + 1e-6))[place], best)
    order = best.argsort(descending=True, stable=True)
    order = order[(best[order] > -torch.inf) & (area[place[order]] > 0)]
    label_map = np.full(masks.shape[1:], -1, np.int32)
    confidence = np.zeros(masks.shape[1:], np.float32)
    found = [(int(category[i]), float(best[i]), masks[place[i]].cpu().numpy()) for i in order]
    for k, score, mask in reversed(found):
        label_map[mask], confidence[mask] = k, score
    return label_map, confidence, segments(scored, found)


def segments(scored: Scored, found: list[tuple[int, float, np.ndarray]]) -> tuple[Segment, ...]:
    """Numbers (category, score, mask) by category and sorts them from large to small, without the empty ones."""
    counts: dict[int, int] = {}
    made = []
    for k, score, mask in found:
        area, thing = int(mask.sum()), bool(scored.isthing[k])
        if area:
            counts[k] = counts.get(k, 0) + 1
            made.append(Segment(k, score, thing, counts[k] if thing else 0, area, mask))
    return tuple(sorted(made, key=lambda segment: -segment.area))


FUNCTIONS: dict[str, Callable[..., Decided]] = {"panoptic": panoptic, "instances": instances}
SETTINGS: dict[str, dict[str, type]] = {
    "panoptic": {"object_threshold": float, "overlap_threshold": float},
    "instances": {"top": int},
}


def decision_of(value: Any) -> Callable[[Scored], Decided]:
    """Returns a decision by its name, or by a mapping of `type` and settings.

    Raises:
      UserError: the name or a setting is unknown, or a setting is not a number.
    """
    name, settings = kind_and_settings(value, SETTINGS, "decision")
    return partial(FUNCTIONS[name], **settings)
