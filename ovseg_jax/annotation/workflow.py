"""The annotation of a batch of images by all plugs: from pictures to records (papers/003, section 3).

A record is plain JSON: all results of the plugs with their scores, masks as run lengths. `outputs` decides later which
of them to keep, when the scores of the whole data set are known.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ovseg_jax.annotation.plug import KINDS, Boxes, Picture, Plug, Texts, call, crop, make_plug
from ovseg_jax.annotation.steps import clean_texts, jitter_boxes, nms, stability, vote_tags
from ovseg_jax.errors import UserError

Record = dict[str, Any]
Specs = Mapping[str, Sequence[Mapping[str, Any]]]


class Rules(NamedTuple):
    """How annotations are made and which ones stay.

    Attributes:
      tag_votes: the number of plugs that must give a tag.
      box_score: the least confidence of a box (section 3).
      box_iou: the largest IoU of two boxes; the paper does not say: ours.
      shift: the largest move of a box along its diagonal, in shares of its sides. The stability of a mask compares four
        moves: this one and half of it, in both directions. The paper does not say: ours.
      score_regions: also scores the labels and captions of regions, on their crops: ours.
      stuff_regions: backgrounds are regions too, with captions: ours. UMG-41M has those of detectors alone.
      caption_quantile: the share of captions that are dropped by their score; the paper does not say: ours.
      caption_score: the least score of a caption: ours.
      region_quantile: as `caption_quantile`, of the labels and of the captions of regions, if they are scored. A region
        whose label is dropped is dropped.
      region_score: the least score of the label or a caption of a region.
      stability: the least stability of a mask; the paper does not say: ours.
      visible: the least share of a mask that is not hidden by better ones, as in Panoptic FPN.
      stuff_area: the least visible pixels of a background: ours.
    """

    tag_votes: int = 1
    box_score: float = 0.3
    box_iou: float = 0.5
    shift: float = 0.1
    score_regions: bool = False
    stuff_regions: bool = False
    caption_quantile: float = 0.1
    caption_score: float = -1.0
    region_quantile: float = 0.1
    region_score: float = -1.0
    stability: float = 0.7
    visible: float = 0.5
    stuff_area: int = 16

    def check(self) -> None:
        """Raises a UserError for a value out of range."""
        if self.tag_votes < 1 or self.stuff_area < 0:
            raise UserError("tag_votes must be at least 1, and stuff_area at least 0")
        for name in (
            "box_score",
            "box_iou",
            "shift",
            "caption_quantile",
            "region_quantile",
            "stability",
            "visible",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} is outside of 0 to 1")


RECORD_RULES = ("tag_votes", "box_score", "box_iou", "shift", "score_regions", "stuff_regions")
"""The rules that records depend on; the others may change without annotating again."""


class Annotator:
    """All plugs of a workflow, loaded.

    Args:
      specs: by kind, see `make_plug`. Equal specs of several kinds are one plug.
      rules: see `Rules`.

    Raises:
      UserError: a plug is unknown or cannot be loaded, a kind is unknown, or one needs another one.
    """

    def __init__(self, specs: Specs, rules: Rules):
        self.rules = rules
        made: dict[str, Plug] = {}
        self.plugs: dict[str, list[tuple[str, Plug]]] = {kind: [] for kind in KINDS}
        check_specs(specs)
        for kind, listed in specs.items():
            for spec in listed:
                key = repr(sorted(spec.items()))
                if key not in made or getattr(type(made[key]), kind) is getattr(Plug, kind):
                    made[key] = make_plug(spec, kind)
                self.plugs[kind].append((str(spec["name"]), made[key]))

    def __call__(self, pictures: Sequence[Picture]) -> list[Record]:
        """Returns the record of each image, which is {"image": name, "error": reason} if a plug fails on it."""
        try:
            return self._annotate(pictures)
        except Exception as error:  # of any kind: the other images go on
            if isinstance(error, UserError):
                raise
            if len(pictures) > 1:
                return [record for picture in pictures for record in self([picture])]
            text = " ".join(str(error).split())[:300] or type(error).__name__
            return [{"image": pictures[0].name, "error": text}]

    def _annotate(self, pictures: Sequence[Picture]) -> list[Record]:
        records: list[Record] = [
            {"image": picture.name, "size": list(picture.pixels.shape[:2])} for picture in pictures
        ]
        tags = [found for _, found in self._call("tags", pictures)]
        captions = self._call("captions", pictures)
        merged = [
            self._boxes(found) for found in _rows([f for _, f in self._call("boxes", pictures)], pictures)
        ]
        stuff = [_joined(found) for found in _rows([f for _, f in self._call("stuff", pictures)], pictures)]
        backgrounds = [Boxes(_mask_boxes(m), labels, np.array(scores)) for m, labels, scores in stuff]
        regions = [
            _concatenated(a, b) if self.rules.stuff_regions else a
            for a, b in zip(merged, backgrounds, strict=True)
        ]
        said = self._call("region_captions", pictures, regions)
        # One image at a time, since five masks of each box may be gigabytes.
        masked = [*zip(pictures, merged, strict=True)] if self.plugs["masks"] else []
        masks = [self._masks(*pair) for pair in masked] or [((), ())] * len(pictures)
        for k, record in enumerate(records):
            record["tags"] = vote_tags([found[k] for found in tags], self.rules.tag_votes)
            record["captions"] = _by_plug([(name, found[k]) for name, found in captions])
            things = len(merged[k].labels)
            record["regions"] = [
                {
                    "bbox": [round(float(x), 2) for x in box],
                    "label": label,
                    "score": round(float(score), 5),
                    "isthing": row < things,
                    "captions": _by_plug([(name, found[k][row]) for name, found in said]),
                }
                for row, (box, label, score) in enumerate(zip(*regions[k], strict=True))
            ]
            for row, (mask, steady) in enumerate(zip(*masks[k], strict=True)):
                record["regions"][row] |= {"mask": _rle(mask), "stability": round(float(steady), 5)}
            record["stuff"] = [
                {"label": label, "score": round(float(score), 5), "mask": _rle(mask)}
                for mask, label, score in zip(*stuff[k], strict=True)
            ]
        self._score(records, pictures)
        return records

    def _call(
        self, kind: str, pictures: Sequence[Picture], given: Sequence[Any] | None = None
    ) -> list[tuple[str, Any]]:
        """Calls all plugs of a kind; an error names the plug."""
        found = []
        for name, plug in self.plugs[kind]:
            try:
                found.append((name, call(plug, kind, pictures, given)))
            except UserError:
                raise
            except Exception as error:
                raise RuntimeError(f"{kind} by {name}: {error or type(error).__name__}") from error
        return found

    def _boxes(self, found: Sequence[Boxes]) -> Boxes:
        """Merges the boxes of all detectors."""
        boxes = functools.reduce(_concatenated, found, Boxes(np.zeros((0, 4)), [], np.zeros(0)))
        sure = np.flatnonzero(boxes.scores >= self.rules.box_score)
        kept = sure[nms(boxes.boxes[sure], boxes.scores[sure], self.rules.box_iou)]
        return Boxes(boxes.boxes[kept], [boxes.labels[k] for k in kept], boxes.scores[kept])

    def _masks(self, picture: Picture, boxes: Boxes) -> tuple[Any, Any]:
        """Returns masks and stability; of several plugs, for each box the mask that is most stable."""
        shifts = [self.rules.shift * share for share in (-1.0, -0.5, 0.5, 1.0)]
        size, count = picture.pixels.shape[:2], 1 + len(shifts)
        others = jitter_boxes(boxes.boxes, shifts, size).reshape(-1, 4)
        moved = Boxes(
            np.concatenate([boxes.boxes, others]), boxes.labels * count, np.tile(boxes.scores, count)
        )
        best, known = np.zeros((len(boxes.labels), *size), bool), np.full(len(boxes.labels), -1.0)
        for _, [found] in self._call("masks", [picture], [moved]) if boxes.labels else ():
            masks = found.reshape(count, -1, *size)
            steady = stability(masks[0], masks[1:])
            better = steady > known
            best[better], known[better] = masks[0][better], steady[better]
        return best, known

    def _score(self, records: Sequence[Record], pictures: Sequence[Picture]) -> None:
        """Scores captions on images, and labels and captions of regions on their crops."""
        if not self.plugs["scores"]:
            return
        texts = [[text for text, _ in record["captions"]] for record in records]
        for record, scores in zip(records, self._means(pictures, texts), strict=True):
            record["captions"] = [
                [*c, round(float(s), 5)] for c, s in zip(record["captions"], scores, strict=True)
            ]
        if not self.rules.score_regions:
            return
        jobs = [
            (region, crop(p, region["bbox"]))
            for r, p in zip(records, pictures, strict=True)
            for region in r["regions"]
        ]
        said = [[region["label"], *(text for text, _ in region["captions"])] for region, _ in jobs]
        for (region, _), (label, *scores) in zip(jobs, self._means([c for _, c in jobs], said), strict=True):
            region["label_score"] = round(float(label), 5)
            region["captions"] = [
                [*c, round(float(s), 5)] for c, s in zip(region["captions"], scores, strict=True)
            ]

    def _means(self, pictures: Sequence[Picture], texts: Sequence[Texts]) -> list[Any]:
        """Returns the mean over the plugs of the scores of texts."""
        if not pictures:
            return []
        found = [scores for _, scores in self._call("scores", pictures, texts)]
        return [np.mean(own, 0) for own in zip(*found, strict=True)]


def check_specs(specs: Specs) -> None:
    """Checks the plugs of each kind without loading them.

    Raises:
      UserError: a kind is unknown, or needs plugs of another one.
    """
    if unknown := sorted(specs.keys() - set(KINDS)):
        raise UserError(f"{unknown[0]!r} is no kind of plugs; the kinds are {', '.join(KINDS)}")
    if not any(specs.get(kind) for kind in KINDS if kind != "scores"):
        raise UserError(
            f"name at least one plug of these kinds: {', '.join(kind for kind in KINDS if kind != 'scores')}"
        )
    for kind, needed in (
        ("masks", ("boxes",)),
        ("region_captions", ("boxes", "stuff")),
        ("scores", ("captions", "boxes")),
    ):
        if specs.get(kind) and not any(specs.get(other) for other in needed):
            raise UserError(f"plugs of {kind} need one of {needed[0]}")


def _rows(found: Sequence[Sequence[Any]], pictures: Sequence[Picture]) -> list[list[Any]]:
    """Returns the results of all plugs for each image."""
    return [[own[k] for own in found] for k in range(len(pictures))]


def _concatenated(a: Boxes, b: Boxes) -> Boxes:
    return Boxes(
        np.concatenate([a.boxes, b.boxes]), [*a.labels, *b.labels], np.concatenate([a.scores, b.scores])
    )


def _by_plug(said: Sequence[tuple[str, Texts]]) -> list[list[str]]:
    """Returns the captions of all plugs without duplicates, as [text, name of the plug]."""
    owner: dict[str, str] = {}
    for name, texts in said:
        for text in texts:
            owner.setdefault(text, name)
    return [[text, owner[text]] for text in clean_texts([*owner])]


def _joined(found: Sequence[Any]) -> tuple[list[Any], Texts, list[float]]:
    """Joins the backgrounds of all plugs by their labels; the best score counts."""
    masks: dict[str, Any] = {}
    scores: dict[str, float] = {}
    for own in found:
        for mask, label, score in zip(own.masks, own.labels, own.scores, strict=True):
            masks[label] = masks[label] | mask if label in masks else mask
            scores[label] = max(scores.get(label, 0.0), float(score))
    kept = [label for label in masks if masks[label].any()]
    return [masks[label] for label in kept], kept, [scores[label] for label in kept]


def _mask_boxes(masks: Sequence[Any]) -> Any:
    """Returns the box around each mask, [n 4]."""
    rows = []
    for mask in masks:
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        rows.append([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
    return np.array(rows, np.float64).reshape(-1, 4)


def _rle(mask: Any) -> str:
    """Returns the run lengths of a mask in COCO's text form."""
    from pycocotools import mask as coco

    return coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
