"""Benchmark splits: seen and unseen classes as groups of a `ClassList`."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.reading import column, flag, read_json, reading, text, whole
from ovseg_jax.vocab.classes import ClassList, parse_labels

UNSEEN = {
    "coco_stuff": (
        "cow; giraffe; suitcase; frisbee; skateboard; carrot; scissors; cardboard; clouds; grass; playingfield; river; "
        "road; tree; wall-concrete"
    ),
    "voc": "pottedplant; sheep; sofa; train; tvmonitor",
}
"""The unseen classes of COCO-Stuff (15 of 171) and Pascal VOC (5 of 20): SPNet's (Xian et al. 2019), which ZSSeg and
papers/000 (appendix B) keep."""

PER_CLASS = ("caltech101", "oxford_pets", "flowers102", "fgvc_aircraft")
"""The data sets whose metric is the mean accuracy of the classes (papers/000, table 11).

The authors' evaluation, and so their table 2, has the overall accuracy of every set. Both averages over sets are
printed therefore.
"""


def split(classes: ClassList, unseen: Sequence[str]) -> ClassList:
    """Adds the groups "seen" and "unseen" to the classes; classes of the group "held_out" are not seen.

    A name matches a class if it equals one of its names up to case, spaces, hyphens and underscores; a name of several
    classes means one of them by the rule of `ClassList.index`.

    Raises:
      UserError: a name matches no class, or no class is seen or unseen.
    """
    place: dict[str, int] = {}
    for name, k in classes.index.items():
        place.setdefault(_key(name), k)
    if unknown := [name for name in unseen if _key(name) not in place]:
        raise UserError(
            f"the unseen class {unknown[0]!r} is not one of the {len(classes)} classes of the data"
        )
    members = {place[_key(name)] for name in unseen}
    withheld = members.union(classes.groups.get("held_out", ()))
    seen = tuple(k for k in range(len(classes)) if k not in withheld)
    if not members or not seen:
        raise UserError(
            f"{len(withheld)} of {len(classes)} classes would be unseen: a split needs both seen and unseen classes"
        )
    return dataclasses.replace(
        classes, groups={**classes.groups, "seen": seen, "unseen": tuple(sorted(members))}
    )


def load_split(classes: ClassList, written: str) -> ClassList:
    """Adds the groups of a split that is given as text.

    Args:
      classes: the classes of the data.
      written: a key of `UNSEEN`; the unseen classes as "cow; giraffe; ..."; or a JSON file that `read_categories` finds
        a group "unseen" in.

    Raises:
      UserError: see `split` and `read_categories`; also if the file has no such group.
    """
    if written.lower().endswith(".json"):
        listed = read_categories(written)
        if "unseen" not in listed.groups:
            raise UserError(
                f"{written} does not list unseen classes; built-in splits are {', '.join(UNSEEN)}"
            )
        with reading(written):
            try:
                return split(classes, [listed.display(k) for k in listed.groups["unseen"]])
            except UserError as error:
                raise ValueError(error) from error
    return split(classes, [names[0] for names in parse_labels(UNSEEN.get(written, written)).names])


def read_categories(path: epath.PathLike) -> ClassList:
    """Reads categories from the JSON form of the lists in published code.

    A list of categories is a list of names, or of objects with "name" and optionally "id" and "isthing". The file is
    such a list, an object that holds one such list, or an object with two, whose keys end in "seen" and "unseen"; the
    object may be nested under the key "data". Categories without ids are numbered from 0.

    Raises:
      UserError: the file cannot be read, or is not of this form.
    """
    data = read_json(path)
    if isinstance(data, dict) and isinstance(data.get("data"), dict | list):
        data = data["data"]
    named = data if isinstance(data, dict) else {"": data}
    lists = {key: value for key, value in named.items() if _are_categories(value)}
    unseen = [key for key in lists if key.endswith("unseen")]
    seen = [key for key in lists if key.endswith("seen") and key not in unseen]
    if len(unseen) == len(seen) == 1:
        entries = lists[seen[0]] + lists[unseen[0]]
    elif len(lists) == 1:
        entries = next(iter(lists.values()))
    else:
        found = f"{len(lists)} lists ({', '.join(lists)})" if lists else "no list"
        raise UserError(f"{path} holds {found} of categories: expected one, or one 'seen' and one 'unseen'")
    objects = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
    with reading(path):
        names = [" ".join(name.split()) for name in column(objects, "name", text, of="category")]
        given = column(objects, "id", whole, default=None, of="category")
        ids = tuple(k if own is None else own for k, own in enumerate(given))
        # If some categories are marked as things, those without a mark are stuff.
        isthing = column(
            objects, "isthing", flag, default=not any("isthing" in o for o in objects), of="category"
        )
        if len(set(ids)) < len(ids):
            raise ValueError(f"the id {next(k for k in ids if ids.count(k) > 1)} occurs twice")
        classes = ClassList(tuple((name,) for name in names), ids, tuple(isthing))
    withheld = names[len(lists[seen[0]]) :] if unseen and seen else []
    return split(classes, withheld) if withheld else classes


def _are_categories(value: Any) -> bool:
    names = (
        [entry.get("name") if isinstance(entry, dict) else entry for entry in value]
        if isinstance(value, list)
        else []
    )
    return bool(names) and all(isinstance(name, str) and name.strip() for name in names)


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())
