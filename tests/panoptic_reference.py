"""Panoptic quality the slow way: one mask for each segment, one pair at a time, in float64."""

from pathlib import Path

import numpy as np
from PIL import Image

PUBLISHED = Path(__file__).parents[1] / "../shared/data/pq_deeplab2"
"""Scenes of DeepLab2's tests, whose PQ is published."""

_COLOURS = {
    (0, 0, 0): 0,
    (0, 0, 255): 1,  # person
    (255, 0, 0): 2,  # bear
    (0, 255, 0): 3,  # tree
    (255, 0, 255): 4,  # bird
    (0, 255, 255): 5,  # sky
    (255, 255, 0): 6,  # cat
}
_TRUE = {
    "team": {0: 0, 47: 1, 97: 1, 133: 1, 150: 1, 174: 1, 198: 2, 215: 1, 244: 1, 255: 1},
    "bird": {92: 5, 176: 3, 255: 4},
    "cat": {0: 0, 255: 6},
}
SCENES = tuple(_TRUE)


def published_scene(name):
    """Returns predicted and true ids [H W], and the class 1..6 of each id; 0 is void, in the prediction too."""
    read = lambda end: np.asarray(Image.open(PUBLISHED / f"{name}_{end}.png").convert("RGB")).astype(int)
    true = read("gt_instance" if name == "team" else "gt")[..., 0]
    label = np.vectorize(lambda i: _TRUE[name][i])(true)
    colours = read("pred_class") @ [1, 256, 65536]
    guess = np.vectorize({r + 256 * g + 65536 * b: k for (r, g, b), k in _COLOURS.items()}.get)(colours)
    # A predicted segment has one class and one instance.
    predicted = read("pred_instance")[..., 0] * 8 + guess + 1
    predicted[guess == 0] = 0
    true = np.where(label, true + 1, 0)
    ids = lambda segments, classes: {int(i): int(classes[segments == i][0]) for i in np.unique(segments) if i}
    return predicted, true, ids(predicted, guess), ids(true, label)


def counts(predicted, true, predicted_class, true_class, crowds, rule="coco"):
    """TP, FP, FN and the sum of IoU of each class, {class: [iou, tp, fp, fn]}, of one image.

    Args:
      predicted: [H W] ids of segments, 0 = none.
      true: [H W] the same, 0 = void.
      predicted_class: {id: class}.
      true_class: {id: class} in the order of the annotations; an id without a class is neither void nor a segment.
      crowds: the ids of crowds.
    """
    found = {k: [0.0, 0, 0, 0] for k in {*predicted_class.values(), *true_class.values()}}
    mask = {p: predicted == p for p in predicted_class}
    truth = {t: true == t for t in true_class}
    void = true == 0
    matched = set()
    for t, k in true_class.items():
        if t in crowds:
            continue
        match = None
        for p in predicted_class:
            inter = np.float64((mask[p] & truth[t]).sum())
            union = np.float64((mask[p] | truth[t]).sum())
            if rule == "coco":
                union -= (mask[p] & void).sum()
            if predicted_class[p] == k and inter / union > 0.5:
                match, iou = p, inter / union
        if match is None:
            found[k][3] += 1
        else:
            matched.add(match)
            found[k][0] += iou
            found[k][1] += 1
    crowd_of = {k: t for t, k in true_class.items() if t in crowds}
    solid = np.isin(true, [t for t in true_class if t not in crowds])
    for p, k in predicted_class.items():
        if p in matched:
            continue
        if rule == "coco":
            ignored = (mask[p] & void).sum()
            if k in crowd_of:
                ignored += (mask[p] & truth[crowd_of[k]]).sum()
        else:
            ignored = (mask[p] & ~solid).sum()
        if ignored / mask[p].sum() <= 0.5:
            found[k][2] += 1
    return found


def means(found, classes):
    """PQ, SQ and RQ over the classes of `classes` that occur, as fractions."""
    rows = []
    for k in classes:
        iou, tp, fp, fn = found.get(k, (0, 0, 0, 0))
        if tp + fp + fn:
            rows.append(
                (iou / (tp + 0.5 * fp + 0.5 * fn), iou / tp if tp else 0, tp / (tp + 0.5 * fp + 0.5 * fn))
            )
    return np.mean(rows, 0)


def random_image(rng, classes=5, shape=(23, 31)):
    """Maps of blocks that partly agree, with void, crowds and an id without a class."""
    blocks = rng.integers(0, 9, (5, 6))
    true = np.repeat(np.repeat(blocks, 5, 0), 6, 1)[: shape[0], : shape[1]]
    moved = np.where(rng.random(blocks.shape) < 0.6, blocks, rng.integers(0, 9, blocks.shape))
    predicted = np.roll(
        np.repeat(np.repeat(moved, 5, 0), 6, 1)[: shape[0], : shape[1]], rng.integers(0, 2), 1
    )
    true_class = {int(t): int(rng.integers(0, classes)) for t in rng.permutation(9) if t}
    true_class.pop(8)
    alike = {
        p: true_class.get(p, 0) if rng.random() < 0.8 else int(rng.integers(0, classes)) for p in range(9)
    }
    predicted_class = {int(p): alike[int(p)] for p in np.unique(predicted) if p}
    crowds = {t for t in true_class if rng.random() < 0.25}
    return predicted, true, predicted_class, true_class, crowds
