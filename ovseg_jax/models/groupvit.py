"""GroupViT (Xu et al. 2022, GroupViT: Semantic Segmentation Emerges from Text Supervision).

Stages of transformer blocks on patches and learned group tokens; at the end of a stage, the group tokens take the place
of the tokens that are assigned to them. In training, the assignment is drawn (Gumbel-softmax), and the hard one has the
gradient of the soft one. Blocks have the names of `models.transformer.VIT`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ovseg_jax.errors import UserError
from ovseg_jax.models.positions import resize_positions
from ovseg_jax.models.projection import Projection
from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.models.transformer import ACTIVATIONS, VIT, Attention, Block, Mlp

# A share p of a pixel in a group is the mask logit SHARPNESS (p - 1/2): since this is linear, upsampled logits have
# their maximum where upsampled shares have it.
SHARPNESS = 20.0


class GroupedImage(NamedTuple):
    """The output of the image side.

    Attributes:
      pooled: the projection of the mean of the groups, the embedding of the whole image; not normalised.
      groups: the projection of each group; not normalised.
      assignment: the share of each patch in each group, the product of the soft assignments of all stages; over the
        groups it sums to 1.
      scale: 1/τ, the factor from cosines to logits.
    """

    pooled: Float[Array, "b e"]
    groups: Float[Array, "b g e"]
    assignment: Float[Array, "b g h w"]
    scale: Float[Array, ""]


class Mixer(nn.Module):
    """An MLP over the axis of tokens, which changes their number."""

    hidden: int
    tokens: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
        """Mixes the tokens of each channel."""
        y = nn.Dense(self.hidden, dtype=self.dtype, name="Dense_0")(x.swapaxes(1, 2))
        y = nn.Dense(self.tokens, dtype=self.dtype, name="Dense_1")(ACTIVATIONS[self.activation](y))
        return y.swapaxes(1, 2)


class Assign(nn.Module):
    """The grouping block (section 3.1): each token is assigned to one group, and each group takes the mean of its own.

    Attributes:
      groups: number of groups.
      heads, hidden, activation, epsilon, dtype: as in `GroupVitImage`.
      ratio: widths inside the MLPs over tokens and over channels, as multiples of the width.
      assign_epsilon: added to the number of tokens of a group.
    """

    groups: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    ratio: tuple[float, float]
    assign_epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], tokens: Float[Array, "b m d"], train: bool = False
    ) -> tuple[Float[Array, "b g d"], Float[Array, "b g n"]]:
        """Returns the groups, and the soft assignment of the tokens `x`, which sums to 1 over the groups."""
        width = x.shape[-1]
        norm = lambda name: nn.LayerNorm(self.epsilon, dtype=self.dtype, name=name)
        dense = lambda name: nn.Dense(width, dtype=self.dtype, name=name)
        mlp = lambda hidden, name: Mlp(hidden, self.activation, VIT, dtype=self.dtype, name=name)
        tokens, x = norm("norm_tokens")(tokens), norm("norm_x")(x)
        mixer = Mixer(int(self.ratio[0] * width), self.groups, self.activation, self.dtype, name="mixer")
        groups = norm("norm_groups")(mixer(tokens))
        attention = Attention(self.heads, VIT, dtype=self.dtype, name="cross_attention")
        groups = groups + attention(groups, x)
        groups = norm("norm_cross")(groups + mlp(self.hidden, "mlp_cross")(norm("norm_mlp_cross")(groups)))
        logits = jnp.einsum("bgd,bnd->bgn", dense("query")(groups), dense("key")(x)) * width**-0.5
        logits = logits.astype(jnp.float32)
        drawn = logits + jax.random.gumbel(self.make_rng("dropout"), logits.shape) if train else logits
        hard = jax.nn.one_hot(drawn.argmax(1), self.groups, axis=1, dtype=self.dtype)
        if train:
            soft = jax.nn.softmax(drawn, 1).astype(self.dtype)
            hard = hard + soft - jax.lax.stop_gradient(soft)
        hard = hard / (hard.sum(-1, keepdims=True) + self.assign_epsilon)
        groups = groups + dense("out")(jnp.einsum("bgn,bnd->bgd", hard, dense("value")(x)))
        hidden = int(self.ratio[1] * width)
        groups = groups + mlp(hidden, "mlp_channels")(norm("norm_channels")(groups))
        return groups, jax.nn.softmax(logits, 1)


class Stage(nn.Module):
    """Blocks on tokens and group tokens, then an assignment if there are group tokens.

    Attributes:
      depth: number of blocks.
      tokens: number of group tokens, 0 for none.
      groups: number of groups after the stage.
      block: fields of the blocks.
      assign: fields of `Assign`.
      project: whether the group tokens of the stage before are added, mixed.
    """

    depth: int
    tokens: int
    groups: int
    block: dict[str, Any]
    assign: dict[str, Any]
    project: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], before: Float[Array, "b m d"] | None, train: bool = False
    ) -> tuple[Float[Array, "b g d"], Float[Array, "b t d"] | None, Float[Array, "b g n"] | None]:
        """Returns the groups, the group tokens and the soft assignment; without group tokens (tokens, None, None)."""
        width, count = x.shape[-1], x.shape[1]
        dtype = self.assign["dtype"]
        if self.tokens:
            table = self.param("group_token", nn.initializers.normal(0.02), (1, self.tokens, width))
            own = jnp.broadcast_to(table.astype(dtype), (x.shape[0], self.tokens, width))
            if self.project:
                y = nn.LayerNorm(self.assign["epsilon"], dtype=dtype, name="token_norm")(before)
                mixer = Mixer(width // 2, self.tokens, self.assign["activation"], dtype, name="token_mixer")
                own = own + mixer(y)
            x = jnp.concatenate([x, own], 1)
        for i in range(self.depth):
            x = Block(**self.block, name=f"encoderblock_{i}")(x)
        if not self.tokens:
            return x, None, None
        x, own = x[:, :count], x[:, count:]
        groups, assignment = Assign(self.groups, **self.assign, name="assign")(x, own, train)
        return groups, own, assignment


class GroupVitImage(nn.Module):
    """The image side, for images of any size; the defaults are those of the published models.

    Attributes:
      patch, width, heads, mlp_dim, grid: as in `models.vit.ViT`.
      depths: number of blocks of each stage.
      tokens: number of group tokens of each stage; 0 for a stage without an assignment.
      groups: number of groups after each stage.
      ratio: see `Assign`.
      assign_epsilon: see `Assign`.
      activation: a key of `ACTIVATIONS`.
      epsilon: epsilon of all layer norms.
      embed_dim, projection: channels of the projection, and inside of it.
      projection_norm: whether it has batch normalisation.
      dtype: compute type; parameters are float32.
    """

    patch: int = 16
    width: int = 384
    heads: int = 6
    mlp_dim: int = 1536
    grid: tuple[int, int] = (14, 14)
    depths: Sequence[int] = (6, 3, 3)
    tokens: Sequence[int] = (64, 8, 0)
    groups: Sequence[int] = (64, 8, 8)
    ratio: tuple[float, float] = (0.5, 4.0)
    assign_epsilon: float = 1.0
    activation: str = "gelu"
    epsilon: float = 1e-5
    embed_dim: int = 256
    projection: int = 4096
    projection_norm: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], train: bool = False) -> GroupedImage:
        """Groups the patches of normalised images, whose sides are multiples of `patch`.

        In training it draws from the random stream "dropout".

        Raises:
          UserError: the fields do not describe stages, or a side is not a multiple of the patch.
        """
        self._check(image.shape[1:3])
        patch = (self.patch, self.patch)
        conv = nn.Conv(self.width, patch, patch, "VALID", dtype=self.dtype, name="embedding")
        x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="patch_norm")(conv(image.astype(self.dtype)))
        b, h, w, _ = x.shape
        rows, columns = self.grid
        table = self.param("pos_embedding", nn.initializers.normal(0.02), (1, rows * columns, self.width))
        table = resize_positions(table.reshape(rows, columns, self.width), (h, w), "bicubic")
        x = (x + table.astype(self.dtype)).reshape(b, h * w, self.width)
        shared = dict(heads=self.heads, hidden=self.mlp_dim, activation=self.activation, epsilon=self.epsilon)
        block = dict(shared, style=VIT, dtype=self.dtype)
        assign = dict(shared, ratio=tuple(self.ratio), assign_epsilon=self.assign_epsilon, dtype=self.dtype)
        own, shares = None, None
        for i, depth in enumerate(self.depths):
            project = i > 0 and self.tokens[i] > 0
            stage = Stage(depth, self.tokens[i], self.groups[i], block, assign, project, name=f"stage_{i}")
            x, own, soft = stage(x, own, train)
            if soft is not None:
                shares = soft if shares is None else jnp.einsum("bgm,bmn->bgn", soft, shares)
        x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(x)
        projection = Projection(
            self.embed_dim, self.projection, self.projection_norm, self.dtype, name="projection"
        )
        # The published start, 1/0.07.
        scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())
        assert shares is not None
        shares = shares.reshape(b, -1, h, w)
        groups = projection(x)  # before the next call, which updates the running statistics in training
        return GroupedImage(projection(x.mean(1), train), groups, shares, jnp.exp(scale))

    def _check(self, size: Sequence[int]) -> None:
        if not len(self.depths) == len(self.tokens) == len(self.groups) or not any(self.tokens):
            raise UserError(
                f"depths={self.depths}, tokens={self.tokens} and groups={self.groups} of GroupViT must name as many "
                "stages, one of them with tokens"
            )
        if any(side % self.patch for side in size):
            raise UserError(
                f"an image of {size[0]} x {size[1]} pixels cannot be cut into patches of {self.patch} pixels"
            )


class GroupVitText(nn.Module):
    """The text side: CLIP's tower and a projection.

    Attributes:
      tower: the tower, without a projection of its own (`embed_dim` is 0).
      embed_dim, projection: channels of the projection, and inside of it.
    """

    tower: CLIPText = CLIPText(width=256, heads=4, embed_dim=0)
    embed_dim: int = 256
    projection: int = 4096

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b e"]:
        """Embeds texts, each by its end token; the result is not normalised."""
        projection = Projection(self.embed_dim, self.projection, dtype=self.tower.dtype, name="projection")
        return projection(self.tower(ids).pooled)
