"""Panoptic quality the slow way: one mask for each segment, one pair at a time, in float64."""

import numpy as np


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
