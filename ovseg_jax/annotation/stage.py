"""The stage of kind "annotate"."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from ovseg_jax.annotation.plug import parse_plug
from ovseg_jax.annotation.run import SHARD, annotate_source
from ovseg_jax.annotation.workflow import Rules
from ovseg_jax.errors import UserError


def annotate_stage(
    folder: epath.Path,
    *,
    source: Mapping[str, Any],
    plugs: Mapping[str, Sequence[Any]],
    rules: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    shard_size: int = SHARD,
) -> dict[str, Any]:
    """Runs a stage of kind "annotate": annotates the images of a source into FOLDER, see `outputs` for the files.

    `data_dir="stage:NAME"` of a source "folder", or `data_dir="stage:NAME/regions", images="stage:NAME/images"` of one
    named "region_json", then reads them. Of several processes the first one annotates, by its own devices.

    Args:
      folder: the folder of the stage; the other arguments are the keys of its config.
      source: as in `data.train`; its images alone are read.
      plugs: a list for each kind of annotation, of "NAME,key=value,..." or dict(name=NAME, key=value, ...).
      rules: those of `Rules` that differ from their defaults.
      batch_size: the number of images at once.
      shard_size: the number of images of a shard.

    Raises:
      UserError: images could not be annotated; and see `annotate_source`.
    """
    if unknown := sorted((rules or {}).keys() - set(Rules._fields)):
        raise UserError(f"rules has no key {unknown[0]!r}; known keys: {', '.join(Rules._fields)}")
    specs = {
        kind: [parse_plug(plug) if isinstance(plug, str) else plug for plug in listed]
        for kind, listed in plugs.items()
    }
    if jax.process_index() == 0:
        done = annotate_source(source, specs, Rules(**(rules or {})), folder, batch_size, shard_size)
        if done.failed:
            raise UserError(
                f"{len(done.failed)} images could not be annotated, see {folder / 'failed.json'}: repair or remove "
                "them, and run it again"
            )
        print(f"{done.made} images annotated in {folder}, {done.there} before", flush=True)
    return {}
