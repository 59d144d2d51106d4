"""Comparison of configs and class lists, to decide whether a run may resume."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.vocab.classes import ClassList

# Keys that may change when a run resumes: they affect reporting and the use of hardware, not what is learned.
RESUME_MUTABLE_KEYS = (
    "accumulate",
    "checkpoint",
    "data.prefetch",
    "data.threads",
    "data.workers",
    "evals",
    "final_evals",
    "log_every",
    "mesh",
    "profile",
    "sharding",
    "tensorboard",
    "wandb",
)


def config_differences(before: ConfigDict, now: ConfigDict, *, grow: bool = True) -> list[str]:
    """Returns the differences that prevent a run from resuming, as "key was a, is b"; [] if there are none.

    The keys in RESUME_MUTABLE_KEYS may change, and `steps` may grow (a schedule over `steps` then changes with it).
    Stages are compared separately, see `stages.check_finished`.

    Args:
      before: the config of the existing run.
      now: the config to resume with.
      grow: whether `steps` may grow.
    """
    old, new = (
        {k: v for k, v in _flat(x.to_dict()).items() if k.split(".")[0] != "stages"} for x in (before, now)
    )
    if (
        grow
        and _is_number(old.get("steps"))
        and _is_number(new.get("steps"))
        and old["steps"] <= new["steps"]
    ):
        new["steps"] = old["steps"]
    return [f"{key} was {was}, is {now}" for key, was, now in _differing(old, new) if not may_change(key)]


def differing(before: ConfigDict, now: ConfigDict) -> list[tuple[str, str, str]]:
    """Returns the keys that differ, each with both values as JSON, or "absent"."""
    return _differing(_flat(before.to_dict()), _flat(now.to_dict()))


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    shown = lambda tree, key: json.dumps(tree[key]) if key in tree else "absent"
    return [
        (key, shown(old, key), shown(new, key))
        for key in sorted(old.keys() | new.keys())
        if not _same(old.get(key, _ABSENT), new.get(key, _ABSENT))
    ]


def may_change(key: str) -> bool:
    """Tells whether a key of a config is, or lies under, one of RESUME_MUTABLE_KEYS."""
    return any(key == mutable or key.startswith(mutable + ".") for mutable in RESUME_MUTABLE_KEYS)


_ABSENT: Any = object()


def _same(a: Any, b: Any) -> bool:
    return a == b if _is_number(a) and _is_number(b) else type(a) is type(b) and a == b


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of a config by their paths."""
    if isinstance(tree, Mapping):
        items: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def class_differences(before: ClassList, now: ClassList) -> list[str]:
    """Returns how two class lists differ in the meaning of labels, as sentences; [] if they do not.

    The number of examples of a class may change, but not from or to zero.
    """
    differing = [f"there were {len(before)} classes, now {len(now)}"] if len(before) != len(now) else []
    for field in ("names", "ids", "isthing", "groups"):
        a, b = getattr(before, field), getattr(now, field)
        if a != b:
            pairs = zip(a, b, strict=False) if isinstance(a, tuple) and isinstance(b, tuple) else [(a, b)]
            places = [(k, was, is_) for k, (was, is_) in enumerate(pairs) if was != is_]
            differing += [f"{field} of class {k} were {was}, are {is_}" for k, was, is_ in places[:3]]
            differing += [f"{field} of {len(places) - 3} other classes differ"] if len(places) > 3 else []
    some = lambda classes: [n > 0 for n in classes.examples]
    if not differing and some(before) != some(now):
        names = [
            before.display(k)
            for k, pair in enumerate(zip(some(before), some(now), strict=False))
            if pair[0] != pair[1]
        ]
        differing.append(
            f"the classes that have examples have changed ({', '.join(names[:8]) or 'none were counted'})"
        )
    return differing
