"""Named protocols of Pascal VOC 2012: the classes of the truth, and the numbers of the predictions.

All of them take VOC's own label maps as truth (0 background, 1..20, 255 void). They differ in the vocabulary that the
method was asked for, and so in the values of its predictions:

pas20            20 classes; background is ignored. Predictions: 0..19.
pas21-openseg    papers/004, 4.1: the method was asked for PASCAL Context's 59 classes, and a pixel predicted as one
                 that VOC lacks is background. Predictions: 0..58 in Context's order.
pas21-catseg     PAS-20b of CAT-Seg (cvlab-kaist/CAT-Seg, datasets/voc20b.json and VOCbEvaluator): VOC's 20 classes and
                 39 other classes of Context. Predictions: 0..19 are VOC's, all from 20 on are background. Its truth is
                 SegmentationClassAug, and images without a labelled pixel are left out.
pas21-groupvit   GroupViT and mmsegmentation: background is where the method was not sure of any class, by a threshold
                 of its own. Predictions: 0 background, 1..20.
"""

from typing import NamedTuple

from ovseg_jax.datasets.pascal_context import frequent_classes
from ovseg_jax.datasets.voc import NAMES
from ovseg_jax.vocab.classes import ClassList

BACKGROUND = "background"

VOC = tuple(name.replace(" ", "") for name in NAMES)
# The order of mmsegmentation, CAT-Seg and of the label files of OpenSeg.
CONTEXT_59 = tuple(name for (name,) in frequent_classes()[0].names)


class Protocol(NamedTuple):
    """A protocol.

    Attributes:
      classes: the classes that are scored, with the values of the truth as ids.
      ignored: the values of the truth that are ignored.
      predicted: the index in `classes` of each value of the predictions that means one of them.
      rest: the index in `classes` of all other values of the predictions; None if they count as wrong.
    """

    classes: ClassList
    ignored: tuple[int, ...]
    predicted: dict[int, int]
    rest: int | None


def _classes(names: tuple[str, ...], first: int) -> ClassList:
    ids = tuple(range(first, first + len(names)))
    return ClassList(tuple((name,) for name in names), ids, tuple(name != BACKGROUND for name in names))


def _protocols() -> dict[str, Protocol]:
    with_background = _classes((BACKGROUND, *VOC), 0)
    same_name = {"diningtable": "table"}
    context = {CONTEXT_59.index(same_name.get(name, name)): k for k, name in enumerate(VOC, 1)}
    return {
        "pas20": Protocol(_classes(VOC, 1), (0, 255), {k: k for k in range(20)}, None),
        "pas21-openseg": Protocol(with_background, (255,), context, 0),
        "pas21-catseg": Protocol(with_background, (255,), {k: k + 1 for k in range(20)}, 0),
        "pas21-groupvit": Protocol(with_background, (255,), {k: k for k in range(21)}, None),
    }


PROTOCOLS = _protocols()
