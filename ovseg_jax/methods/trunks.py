"""The trunks of FC-CLIP's head: a CLIP's image tower gives maps for masks, and features of masks in the space of texts.

FC-CLIP has a frozen ConvNeXt, whose stages are the maps. UMG-CLIP has a frozen ViT or EVA with Convpass adapters
(papers/003, 4.2), and a simple feature pyramid makes the maps from its last one (ours: the paper does not say how one
map feeds the four scales of Mask2Former).
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, UInt8

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.cpu_convs import fast_on_cpu
from ovseg_jax.kernels.unit import unit
from ovseg_jax.models.convnext import ConvNeXt
from ovseg_jax.models.convpass import ADAPTERS
from ovseg_jax.models.eva import Eva
from ovseg_jax.models.openseg import LEVELS, normalise
from ovseg_jax.models.tower import project
from ovseg_jax.models.tower_pyramid import TowerPyramid, level_of
from ovseg_jax.models.vit import ViT
from ovseg_jax.pretrained.to_torch import describe, describe_adapted
from ovseg_jax.protocols import Variables
from ovseg_jax.towers.clip import MEAN, STD, Clip

CLIP_FEATURES = ("adapted", "frozen")


class TrunkOutput(NamedTuple):
    """The features of an image that a head needs.

    Attributes:
      maps: "c2" to at most "c5", for masks.
      last: the map under which masks are pooled.
      dense: features of its cells in the space of texts, not normalised.
    """

    maps: dict[str, Float[Array, "b _h _w _c"]]
    last: Float[Array, "b h w c"]
    dense: Float[Array, "b h w d"]


class ConvNeXtTrunk:
    """A frozen ConvNeXt of CLIP: masks are pooled on its last map, and then go through CLIP's head.

    Attributes:
      cell: pixels of a cell of the coarsest map.
      level: the level of the map under which masks are pooled.
    """

    def __init__(self, clip: Clip):
        self._clip = clip
        depths = clip.image.depths  # type: ignore[attr-defined]
        self.cell, self.level = 2 ** (len(depths) + 1), f"c{len(depths) + 1}"

    def shapes(self) -> dict[str, Array]:
        """Returns maps of zeros, of an image of one cell, with which a head can be initialised."""
        width, sizes = self._clip.image.width, range(2, int(self.level[1:]) + 1)  # type: ignore[attr-defined]
        side = lambda i: self.cell // 2**i
        return {f"c{i}": jnp.zeros((1, side(i), side(i), width * 2 ** (i - 2))) for i in sizes}

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Creates the trained parameters, of which there are none."""
        del rng
        return {}

    def split(self, towers: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits weights of CLIP into those to train, none, and the others."""
        return {}, towers

    def apply(self, variables: Variables, image: Array, rng: jax.Array | None = None) -> TrunkOutput:
        """Computes the maps of normalised images; with `rng`, as in training, a CPU computes them by `fast_on_cpu`."""
        apply = self._clip.image.apply
        # An export, which is without `rng`, is for all devices.
        out: Any = (apply if rng is None else fast_on_cpu(apply))(variables["towers"]["image"], image)
        maps = {level: x for level, x in out.items() if level in LEVELS}
        return TrunkOutput(maps, maps[self.level], out["dense"])

    def described(self, variables: Variables) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the parameters and the description of the form in PyTorch, see `pretrained.to_torch.describe`."""
        return variables["towers"]["image"]["params"], describe(self._clip.image)

    def embed(self, variables: Variables, pooled: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
        """Maps pooled features to unit vectors in the space of texts."""
        weights = {"params": variables["towers"]["image"]["params"]["head"]}
        head = self._clip.image.head()  # type: ignore[attr-defined]
        return unit(head.apply(weights, pooled).astype(jnp.float32))


class TowerTrunk:
    """A frozen ViT or EVA of CLIP with or without adapters, and a pyramid of its last map.

    Trained parameters are those of the pyramid and, in a tree like the tower's, the adapters. CLIP's features of masks
    are means of patch tokens: the projection and the mean commute.

    Attributes:
      cell, level: see `ConvNeXtTrunk`.

    Args:
      clip: the towers, see `Clip.adapted`.
      features: "adapted" if CLIP's features of masks come from the tower with its adapters, "frozen" if from the tower
        without them, in a second pass. The paper does not say.

    Raises:
      UserError: the tower has no patches in the space of texts, or their side is no power of two; `features` is
        unknown.
    """

    def __init__(self, clip: Clip, features: str):
        clip.check_patches("")
        tower = clip.image
        assert isinstance(tower, ViT | Eva)
        if tower.patch not in (4, 8, 16, 32):
            raise UserError(
                f"towers.image: patches of {tower.patch} pixels do not fit the strides of a pyramid; "
                "set towers.image.patch=16, for which their weights are resized"
            )
        if features not in CLIP_FEATURES:
            raise UserError(f"fcclip.clip_features={features!r} is not one of {', '.join(CLIP_FEATURES)}")
        self._tower, self._plain = tower, clip.without_adapters().image
        self._train = clip.adapted(train=True) if tower.adapter else tower
        self._again = features == "frozen" and tower.adapter is not None
        self._pyramid = TowerPyramid(self._plain, clip.dtype)
        self.cell, self.level = 32, f"c{level_of(tower.patch)}"

    def _zeros(self) -> Array:
        side = self.cell // self._tower.patch
        return jnp.zeros((1, side, side, self._tower.width))

    def shapes(self) -> dict[str, Array]:
        """Returns maps of zeros, of an image of one cell, with which a head can be initialised."""
        shapes = jax.eval_shape(
            lambda: self._pyramid.init_with_output(jax.random.key(0), self._zeros(), method="of_tokens")[0]
        )
        return {level: jnp.zeros(x.shape) for level, x in shapes.items()}

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Creates the parameters of the pyramid."""
        return {"pyramid": self._pyramid.init(rng, self._zeros(), method="of_tokens").get("params", {})}

    def split(self, towers: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits weights of CLIP into those to train, the adapters, and the others."""
        flat = flatten_dict(towers["image"]["params"], sep="/")
        adapters = {path: x for path, x in flat.items() if re.search(ADAPTERS, path)}
        rest = unflatten_dict({path: x for path, x in flat.items() if path not in adapters}, sep="/")
        image = {**towers["image"], "params": rest}
        return {"adapters": unflatten_dict(adapters, sep="/")} if adapters else {}, {**towers, "image": image}

    def apply(self, variables: Variables, image: Array, rng: jax.Array | None = None) -> TrunkOutput:
        """Computes the maps of normalised images; with `rng` the adapters have dropout."""
        params, frozen = variables["params"], variables["towers"]["image"]["params"]
        tower, rngs = (self._tower, None) if rng is None else (self._train, {"dropout": rng})
        out: Any = tower.apply({"params": unflatten_dict(self._weights(variables))}, image, rngs=rngs)
        maps: Any = self._pyramid.apply({"params": params["pyramid"]}, out.tokens, method="of_tokens")
        if self._again and rng is None:
            out = self._plain.apply({"params": frozen}, image)
        dense = project(frozen, out.tokens)
        return TrunkOutput(maps, dense, dense)

    def described(self, variables: Variables) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the parameters and the description of the form in PyTorch, see `ConvNeXtTrunk.described`."""
        weights = {"tower": unflatten_dict(self._weights(variables)), **variables["params"]["pyramid"]}
        return weights, dict(describe_adapted(self._tower), again=self._again)

    @staticmethod
    def _weights(variables: Variables) -> dict[tuple[str, ...], Any]:
        """Returns the tower's parameters with those of its adapters."""
        frozen = variables["towers"]["image"]["params"]
        return flatten_dict(frozen) | flatten_dict(variables["params"].get("adapters", {}))

    def embed(self, variables: Variables, pooled: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
        """Maps pooled features to unit vectors in the space of texts."""
        del variables
        return unit(pooled.astype(jnp.float32))


def make_trunk(clip: Clip, features: str) -> ConvNeXtTrunk | TowerTrunk:
    """Creates the trunk of an image tower; for `features` see `TowerTrunk`.

    Raises:
      UserError: the tower is none of ConvNeXt, ViT and EVA.
    """
    if isinstance(clip.image, ConvNeXt):
        return ConvNeXtTrunk(clip)
    if isinstance(clip.image, ViT | Eva):
        return TowerTrunk(clip, features)
    raise UserError(
        f"towers.image.name={clip.config.image.name!r}: a trunk of fcclip is a ConvNeXt, ViT or EVA of CLIP"
    )


def prepared(
    clip: Clip, cell: int, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
) -> tuple[Float[Array, "b s t 3"], Int[Array, "b 2"]]:
    """Returns normalised images, and their sizes rounded up to whole cells of the coarsest map.

    In the published FC-CLIP, padding to such a multiple is part of the image.
    """
    pixels = tuple(clip.config.get("mean", MEAN)), tuple(clip.config.get("std", STD))
    size = jnp.minimum(-(-image_size // cell) * cell, jnp.array(image.shape[1:3]))
    return normalise(image, image_size, *pixels, clip.dtype), size
