"""Which classes a benchmark withholds: seen and unseen classes as groups of a `ClassList`."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from ovseg_jax.errors import UserError
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


def split(classes: ClassList, unseen: Sequence[str]) -> ClassList:
    """The classes with the groups "seen" and "unseen" beside their own; what they held out already is not seen.

    A name fits a class if it equals one of its names but for case, spaces, hyphens and underscores.

    Raises:
      UserError: a name that fits no class, or nothing left that is seen.
    """
    place = {_key(name): k for k, names in reversed(list(enumerate(classes.names))) for name in names}
    if unknown := [name for name in unseen if _key(name) not in place]:
        raise UserError(f"the unseen class {unknown[0]!r} is none of the {len(classes)} classes of the data")
    members = {place[_key(name)] for name in unseen}
    withheld = members.union(classes.groups.get("held_out", ()))
    seen = tuple(k for k in range(len(classes)) if k not in withheld)
    if not members or not seen:
        raise UserError(
            f"{len(withheld)} of {len(classes)} classes would be unseen: a split has classes on both sides"
        )
    return dataclasses.replace(
        classes, groups={**classes.groups, "seen": seen, "unseen": tuple(sorted(members))}
    )


def load_split(classes: ClassList, text: str) -> ClassList:
    """`split` by what a person writes.

    Args:
      classes: the classes of the data.
      text: a key of `UNSEEN`; the unseen classes as "cow; giraffe; ..."; or a JSON file that `read_categories` finds a
        group "unseen" in.

    Raises:
      UserError: as `split` and `read_categories` do, and for a file without such a group.
    """
    if text.endswith(".json"):
        listed = read_categories(text)
        if "unseen" not in listed.groups:
            raise UserError(
                f"{text} does not say which classes are unseen; published splits are {', '.join(UNSEEN)}"
            )
        return split(classes, [listed.display(k) for k in listed.groups["unseen"]])
    return split(classes, [names[0] for names in parse_labels(UNSEEN.get(text, text)).names])


def read_categories(path: epath.PathLike) -> ClassList:
    """Reads categories as published code lists them, kept as JSON.

    A list of categories is a list of names, or of objects with "name" and maybe "id" and "isthing". The file is such a
    list, or an object with one, or with one whose key ends in "unseen" and one whose key ends in "seen"; the object may
    itself stand under "data". Categories without ids are numbered from 0.

    Raises:
      UserError: the file cannot be read, or holds nothing of this form.
    """
    try:
        data = json.loads(epath.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
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
        raise UserError(f"{path} holds {found} of categories: it takes one, or one 'seen' and one 'unseen'")
    objects = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
    # Where some are marked as things, the others are none.
    default = not any("isthing" in o for o in objects)
    try:
        ids = tuple(int(o.get("id", k)) for k, o in enumerate(objects))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds an id that is no number ({error})") from error
    isthing = tuple(bool(o.get("isthing", default)) for o in objects)
    classes = ClassList(tuple((o["name"],) for o in objects), ids, isthing)
    withheld = [o["name"] for o in objects[len(lists[seen[0]]) :]] if unseen and seen else []
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
