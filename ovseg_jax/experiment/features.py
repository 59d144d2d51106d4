"""Features of a frozen image tower, computed once, so that prompt tuning only runs the text tower."""

import json
import logging
import zlib
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from ovseg_jax.data.source_base import Source, check_provides
from ovseg_jax.errors import UserError
from ovseg_jax.files import forget, record, verify, write_whole
from ovseg_jax.parallel.sharding import DEFAULT_RULES, leaf_sharding, put_batch, replicated, tree_paths
from ovseg_jax.reading import read_json, reading, short
from ovseg_jax.train.state import abstract_variables, create_variables

FOLDER = "features"
NEEDS = ("image", "label")
"""The fields that a source must provide for cached features."""
_log = logging.getLogger(__name__)


class Features(Source):
    """A classification source whose examples hold `feature` [V d], the unit vectors of an image's V views.

    Args:
      source: the source of the images.
      features: [n V d], the unit vectors of all views.
    """

    provides = frozenset({"feature", "label"})
    labels: np.ndarray

    def __init__(self, source: Source, features: np.ndarray):
        assert source.labels is not None
        self.name, self.classes, self.labels = source.name, source.classes, source.labels
        self.counts = source.counts
        self._features = features

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"feature": self._features[index], "label": int(self.labels[index]), "image_id": str(index)}


def cached_features(config: ConfigDict, workdir: epath.Path, parts: Any, source: Any) -> Features:
    """Returns a source of features in place of images, computed on all devices or read from the run's folder.

    `config.data.cache_features` is V, the number of augmented views of each image. The features are those of the towers
    that the run starts from, so the towers must be frozen.
    """
    from ovseg_jax.data.pipeline import view_batches  # grain's import takes long
    from ovseg_jax.data.rows import Rows

    check_provides(source, NEEDS, "data.cache_features")
    views = int(config.data.cache_features)
    folder = workdir / FOLDER
    wanted = {"examples": len(source), "views": views, "data": _fingerprint(source)}
    features = kept_features(folder, wanted)
    # All processes must agree to compute, though a shared disk may show them different states.
    if multihost_utils.process_allgather(np.array(features is None)).any():
        process = dict(process_index=jax.process_index(), process_count=jax.process_count())
        batches = view_batches(config, Rows.from_config(config, NEEDS), source, views, **process)
        computed = _compute(config, parts, batches, len(source) * views)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            forget(folder / "features.npy")
            with (folder / "features.npy").open("wb") as file:
                np.save(file, computed.reshape(len(source), views, -1))
            record(folder / "features.npy")
            write_whole(folder / "done.json", json.dumps(wanted))
        multihost_utils.sync_global_devices("features")
        features = kept_features(folder, wanted)
    if features is None:
        raise UserError(f"{folder} cannot be read by all processes: it must be on a shared disk")
    return Features(source, features)


def kept_features(folder: epath.Path, wanted: dict[str, Any]) -> np.ndarray | None:
    """Reads the features of an earlier start; None if there are none, or they are damaged or of other data."""
    if not (folder / "done.json").exists():
        return None
    try:
        if (found := read_json(folder / "done.json")) != wanted:
            raise UserError(
                f"{folder} holds features of other data: {short(found)} instead of {short(wanted)}"
            )
        path = folder / "features.npy"
        verify(path)
        with reading(path), path.open("rb") as file:
            features = np.load(file, allow_pickle=False)
            if features.ndim != 3 or features.shape[:2] != (wanted["examples"], wanted["views"]):
                raise ValueError(f"it holds an array of the shape {features.shape}")
            return features
    except UserError as error:
        _log.warning("%s; the features are computed again", error)
        return None


def _fingerprint(source: Source) -> int:
    """Returns a checksum of the image ids in order."""
    crc = 0
    for index in range(len(source)):
        crc = zlib.crc32(str(source[index]["image_id"]).encode("utf-8", "surrogateescape") + b"\n", crc)
    return crc


def _compute(config: ConfigDict, parts: Any, batches: Any, count: int) -> np.ndarray:
    """Computes the features of the first `count` rows of the batches, in order."""
    method: Any = parts.method
    mesh, rules = parts.mesh, config.get("sharding", DEFAULT_RULES)
    rows: list[np.ndarray] = []
    with jax.set_mesh(mesh):
        variables = _start(method, config.seed, mesh, rules)
        embed = jax.jit(method.embed_image, out_shardings=replicated(mesh))
        steps, hide = -(-count // config.batch_size), jax.process_index() > 0
        for batch in tqdm(
            batches, "features", steps, unit="batch", disable=hide, mininterval=5, dynamic_ncols=True
        ):
            rows.append(np.asarray(embed(variables, put_batch({"image": batch["image"]}, mesh)["image"])))
    return np.concatenate(rows)[:count]


def _start(method: Any, seed: int, mesh: Any, rules: Any) -> Any:
    """Returns the variables that a run starts from."""
    shapes = abstract_variables(method, seed)
    place = lambda leaf, path: leaf_sharding(path, leaf.shape, mesh, rules)
    placed = {name: jax.tree.map(place, tree, tree_paths(tree)) for name, tree in shapes.items()}
    return create_variables(method, seed, placed, method.pretrained())
