"""A few examples of each class of a group."""

import numpy as np
import pytest

from ovseg_jax.data.source_base import Source
from ovseg_jax.data.sources.build import Cached, make_source
from ovseg_jax.data.sources.few_shot import FewShot
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.run import _counted
from ovseg_jax.vocab.classes import ClassList


class Numbers(Source):
    """Example i is of class i % 5, but class 3 has two examples alone and class 4 none."""

    def __init__(self):
        self.name, self.provides = "numbers", frozenset({"label"})
        labels = np.arange(40) % 5
        self.labels = np.array([*labels[(labels < 3)], 3, 3], np.int32)[::-1].copy()
        self.classes = ClassList(
            tuple((w,) for w in "abcde"), tuple(range(5)), (True,) * 5, {"vowel": (0, 4)}
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"label": int(self.labels[index]), "image_id": str(index)}


def test_a_part_is_drawn_at_random_and_always_the_same():
    cfg = dict(name=f"{__name__}:Numbers")
    part = make_source(dict(cfg, part=0.25))
    places = [int(part[k]["image_id"]) for k in range(len(part))]
    whole = Numbers()
    assert len(places) == round(0.25 * len(whole)) and places == sorted(set(places)) != [*range(len(places))]
    assert part.labels.tolist() == whole.labels[places].tolist()
    again = make_source(dict(cfg, part=0.25))
    assert [int(again[k]["image_id"]) for k in range(len(again))] == places
    for share in (0, 1.5, "x"):
        with pytest.raises(UserError, match=f"part={share} of the source 'numbers' is not above 0"):
            make_source(dict(cfg, part=share))


def test_at_most_so_many_of_each_class():
    source = Numbers()
    few = FewShot(source, shots=4)
    assert np.bincount(few.labels, minlength=5).tolist() == [4, 4, 4, 2, 0]
    assert [few[k]["label"] for k in range(len(few))] == few.labels.tolist()
    places = [int(few[k]["image_id"]) for k in range(len(few))]
    assert places == sorted(set(places))
    assert few.classes is source.classes and few.labels.dtype == np.int32
    with pytest.raises(IndexError):
        few[len(few)]


def test_how_common_a_class_is_is_known_beside_its_shots():
    """Eq. 8 of papers/000 speaks of all examples."""
    assert FewShot(Numbers(), shots=2).counts.tolist() == [8, 8, 8, 2, 0]
    vowels = Cached(FewShot(Numbers(), shots=2, group="vowel"))
    assert vowels.counts.tolist() == [8, 0, 0, 0, 0] and len(vowels) == 2
    assert _counted(vowels).examples == (8, 0, 0, 0, 0)


def test_the_seed_draws_and_nothing_else():
    ids = lambda few: [few[k]["image_id"] for k in range(len(few))]
    source = Numbers()
    assert ids(FewShot(source, 4, 1)) == ids(FewShot(Numbers(), 4, 1)) != ids(FewShot(source, 4, 2))
    # Whether other classes are drawn makes no difference.
    vowels = ids(FewShot(source, 4, 1, "vowel"))
    few = FewShot(source, 4, 1)
    assert vowels == [few[k]["image_id"] for k in range(len(few)) if few.labels[k] == 0]


@pytest.mark.parametrize(
    ("group", "labels"),
    [("base", {0, 1, 2}), ("new", {3}), ("vowel", {0}), ("", {0, 1, 2, 3}), ("base+new", {0, 1, 2, 3})],
)
def test_groups(group, labels):
    few = FewShot(Numbers(), 0, 0, group)
    assert set(few.labels) == labels
    assert len(few) == np.isin(Numbers().labels, list(labels)).sum()
    named = {"base": (0, 1, 2), "new": (3, 4)} if group == "base+new" else {}
    assert few.classes.groups == {"vowel": (0, 4), **named}


def test_errors():
    with pytest.raises(UserError, match=r"group=.odd. of .* is not one of base, new, base\+new, vowel"):
        FewShot(Numbers(), group="odd")
    with pytest.raises(UserError, match="shots=-1"):
        FewShot(Numbers(), -1)
    empty = Numbers()
    empty.labels[empty.labels == 3] = 2
    with pytest.raises(UserError, match="no example of group='new'"):
        FewShot(empty, group="new")


def test_make_source_applies_it_to_sources_with_labels():
    scenes = {"name": "scenes", "num_examples": 6, "image_size": 32, "size": "tiny"}
    crops = {"name": "crops", "of": scenes, "min_size": 4}
    few = make_source({**crops, "shots": 1, "group": "seen", "seed": 3, "cache": True})
    assert np.bincount(few.labels).max() == 1 and set(few.labels) <= set(few.classes.groups["seen"])
    assert few[0]["label"] == few.labels[0] and few[0] is few[0]
    own = make_source({"name": "scene_objects", "shots": 2, "group": "stuff", "size": "tiny"})
    assert type(own).__name__ == "SceneObjects" and len(own) == 8
    with pytest.raises(UserError, match="'scenes' has no label, which the argument 'shots' needs"):
        make_source({**scenes, "shots": 1})
    with pytest.raises(UserError, match="'crops' has no argument 'seed'"):
        make_source({**crops, "seed": 1})
