"""Features of a frozen image tower, computed once: an epoch of prompt tuning then costs the text side alone."""

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from ovseg_jax.data.source_base import Source, check_provides
from ovseg_jax.parallel.sharding import DEFAULT_RULES, leaf_sharding, put_batch, replicated, tree_paths
from ovseg_jax.protocols import Classifier
from ovseg_jax.train.state import abstract_variables, replaced

FOLDER = "features"


class Features(Source):
    """A classification source whose examples hold `feature` [V d], the unit vectors of an image's V views.

    Args:
      source: the source of the images.
      features: [n V d].
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
    """A source of features in place of images, computed on all devices, or read where a run has computed them.

    `config.data.cache_features` is V, how many augmented views of each image are kept. The towers are those that the
    run starts from, so they have to be frozen.
    """
    from ovseg_jax.data.pipeline import view_batches  # grain's import takes long

    check_provides(source, ("image", "label"), "data.cache_features")
    views = int(config.data.cache_features)
    folder = workdir / FOLDER
    wanted = {"examples": len(source), "views": views}
    if not (folder / "done.json").exists() or json.loads((folder / "done.json").read_text()) != wanted:
        process = dict(process_index=jax.process_index(), process_count=jax.process_count())
        batches = view_batches(config, parts.words, source, views, **process)
        features = _compute(config, parts, batches, len(source) * views)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "features.npy").open("wb") as file:
                np.save(file, features.reshape(len(source), views, -1))
            (folder / "done.json").write_text(json.dumps(wanted))
        multihost_utils.sync_global_devices("features")
    with (folder / "features.npy").open("rb") as file:
        return Features(source, np.load(file))


def _compute(config: ConfigDict, parts: Any, batches: Any, count: int) -> np.ndarray:
    """Features of `count` rows that come in batches, in order."""
    method: Classifier = parts.method
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


def _start(method: Classifier, seed: int, mesh: Any, rules: Any) -> Any:
    """The variables that a run starts from."""
    shapes = abstract_variables(method, seed)
    place = lambda leaf, path: leaf_sharding(path, leaf.shape, mesh, rules)
    placed = {name: jax.tree.map(place, tree, tree_paths(tree)) for name, tree in shapes.items()}
    variables = jax.jit(method.init, out_shardings=placed)(jax.random.key(seed))
    return replaced(variables, method.pretrained())
