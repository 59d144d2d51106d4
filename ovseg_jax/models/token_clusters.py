"""Clusters of patch tokens between two blocks of a tower, which later blocks compute as one token each.

UMG-CLIP (papers/003, 4.1) removes 75% of the tokens in pre-training as AiluRus does (Li et al., NeurIPS 2023), by
spatial-aware density-based clustering. Neither published its code; DPC-KNN as in TCFormer takes its place (ours).
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.dpc_knn import dpc_knn
from ovseg_jax.models.transformer import Places


@dataclasses.dataclass(frozen=True)
class TokenClusters:
    """A `between` of a tower that replaces its patch tokens by the means of clusters, once.

    A cluster has the place of its centre, so that rotary angles are the centre's; `Places.unfold` at the end of the
    tower gives every place its cluster's token.

    Attributes:
      after: the number of blocks before the clustering. AiluRus clusters a Segmenter ViT-L after 2; papers/003 do not
        say.
      ratio: the share of tokens that remain, rounded up; 0.25 in papers/003.
      neighbours: tokens that count for a density, see `dpc_knn`; 5 in TCFormer.

    Raises:
      UserError: a value is invalid.
    """

    after: int = 2
    ratio: float = 0.25
    neighbours: int = 5

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.after < 1:
            raise UserError(f"clusters.after={self.after} is less than 1, the first block")
        if not 0 < self.ratio <= 1:
            raise UserError(f"clusters.ratio={self.ratio} is not a share of the tokens in (0, 1]")
        if self.neighbours < 1:
            raise UserError(f"clusters.neighbours={self.neighbours} is less than 1")

    def __call__(
        self, i: int, x: Float[Array, "b n d"], places: Places
    ) -> tuple[Float[Array, "b k d"], Places]:
        """Clusters the tokens after block `after` - 1 and leaves them as they are after others."""
        if i != self.after - 1:
            return x, places
        kept, owner = dpc_knn(x, math.ceil(self.ratio * x.shape[1]), self.neighbours)
        member = (owner[:, None] == jnp.arange(kept.shape[1])[:, None]).astype(x.dtype)
        total = jnp.einsum("bkn,bnd->bkd", member, x, preferred_element_type=jnp.float32)
        size = member.sum(-1, dtype=jnp.float32)[..., None]
        return (total / size).astype(x.dtype), dataclasses.replace(places, kept=kept, owner=owner)


def with_clusters(tower: Any, *, after: int = 2, ratio: float = 0.25, neighbours: int = 5) -> Any:
    """Returns a copy of a tower, a `ViT` or `Eva`, that clusters its tokens; for the arguments see `TokenClusters`.

    Raises:
      UserError: a value is invalid, or no block comes after the clustering.
    """
    if after >= tower.depth:
        raise UserError(
            f"clusters.after={after} leaves no block of the {tower.depth} of the tower for clusters"
        )
    return tower.clone(between=TokenClusters(after, ratio, neighbours))
