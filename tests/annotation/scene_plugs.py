"""Annotators that know the truth of `scenes`, with an error where it is asked for: functions, as a user writes them.

The image's name says which scene it is. `seed` and `size` are those of the source.
"""

import functools

import numpy as np

from ovseg_jax.annotation.plug import Boxes, Stuff
from ovseg_jax.data.scenes.source import Scenes
from ovseg_jax.data.source_base import replaced


class ClassTags(Scenes):
    """The same scenes, in which a region has one tag, the name of its class, as after annotation."""

    def __getitem__(self, index):
        names, example = self.classes.names, super().__getitem__(index)
        return replaced(example, region_tags=lambda e: [[names[c][0]] for c in e["class_ids"]])


@functools.cache
def scenes(size, seed):
    return {
        split: Scenes(split, num_examples=100_000, image_size=size, seed=seed) for split in ("train", "test")
    }


def truth(picture, size=64, seed=0, move=0):
    """The example of a picture, or the one `move` places later."""
    split, _, number = picture.name.partition("-")
    return scenes(size, seed)[split][int(number) + move]


def draw(picture, kind):
    return np.random.default_rng([sum(picture.name.encode()), int(picture.name[-6:]), kind])


def rows(example, thing):
    return [k for k, own in enumerate(example["isthing"]) if own == thing]


def tags(pictures, size=64, seed=0):
    return [list(truth(p, size, seed)["tags"]) for p in pictures]


def captions(pictures, size=64, seed=0, others=0.0):
    """Two captions; a share `others` of them are of another image."""
    found = []
    for p in pictures:
        wrong = draw(p, 0).random(2) < others
        found.append([truth(p, size, seed, 1000 * bool(w))["captions"][k] for k, w in enumerate(wrong)])
    return found


def boxes(pictures, size=64, seed=0, off=0.0, mislabelled=0.0):
    """The boxes of things: corners moved by up to `off` of their sides, a share with the class of another scene."""
    found = []
    for p in pictures:
        example, rng = truth(p, size, seed), draw(p, 1)
        kept = rows(example, True)
        places = np.asarray(example["boxes"], np.float64)[kept]
        sides = np.tile(places[:, 2:] - places[:, :2], 2)
        places = places + off * sides * rng.uniform(-1, 1, places.shape)
        names = scenes(size, seed)["train"].classes.names
        labels = [names[example["class_ids"][k]][0] for k in kept]
        other = truth(p, size, seed, 2000)
        wrong = [names[other["class_ids"][k]][0] for k in rows(other, True)]
        labels = [
            wrong[k % len(wrong)] if rng.random() < mislabelled else own for k, own in enumerate(labels)
        ]
        found.append(Boxes(places, labels, np.full(len(kept), 0.9)))
    return found


def best(example, box, thing=None):
    """The segment whose box has the largest IoU with a box."""
    from ovseg_jax.annotation.steps import box_iou

    iou = box_iou(np.asarray(example["boxes"], np.float64), np.asarray(box, np.float64)[None])[:, 0]
    return int(np.argmax(iou)), iou.max()


def region_captions(pictures, boxes, size=64, seed=0, others=0.0):
    """The caption of the segment nearest to each box; a share `others` is one of another scene."""
    found = []
    for p, own in zip(pictures, boxes, strict=True):
        example, rng, other = truth(p, size, seed), draw(p, 2), truth(p, size, seed, 3000)
        said = []
        for k, box in enumerate(own.boxes):
            wrong = rng.random() < others
            row = k % len(other["region_captions"]) if wrong else best(example, box)[0]
            said.append(list((other if wrong else example)["region_captions"][row]))
        found.append(said)
    return found


def masks(pictures, boxes, size=64, seed=0):
    """The mask of the segment nearest to each box, if it is near; else what is in the box, as a masker that fails."""
    found = []
    for p, own in zip(pictures, boxes, strict=True):
        example = truth(p, size, seed)
        drawn = np.zeros((len(own.boxes), *p.pixels.shape[:2]), bool)
        for mask, box in zip(drawn, own.boxes, strict=True):
            row, iou = best(example, box)
            if iou > 0.5:
                mask[:] = example["segments"] == row + 1
            else:
                x0, y0, x1, y1 = np.round(box).astype(int)
                mask[y0:y1, x0:x1] = True
        found.append(drawn)
    return found


def stuff(pictures, size=64, seed=0):
    found = []
    for p in pictures:
        example = truth(p, size, seed)
        names, kept = scenes(size, seed)["train"].classes.names, rows(example, False)
        drawn = np.stack([example["segments"] == k + 1 for k in kept])
        found.append(Stuff(drawn, [names[example["class_ids"][k]][0] for k in kept], np.ones(len(kept))))
    return found


def perfect(**options):
    """The config of all plugs; options by kind."""
    kinds = ("tags", "captions", "boxes", "region_captions", "masks", "stuff")
    return {kind: [{"name": f"{__name__}:{kind}", **options.get(kind, {})}] for kind in kinds}
