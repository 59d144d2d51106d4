"""The Vision Transformer (Dosovitskiy et al. 2020) in the variants of DINO, MAE, CLIP, SigLIP, TIPS and big_vision.

Parameters have the names and layouts of big_vision's ViT: `embedding`, `pos_embedding`, `cls`,
`Transformer/encoderblock_{i}`, `Transformer/encoder_norm`, `MAPHead_0`, `head`. Additions are CLIP's `pre_norm`, and a
first row of `pos_embedding` for a class token with a position of its own.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ovseg_jax.errors import UserError
from ovseg_jax.models.positions import resize_positions
from ovseg_jax.models.remat import rematerialise
from ovseg_jax.models.tower import TowerOutput, visible
from ovseg_jax.models.transformer import (
    ACTIVATIONS,
    LAST,
    VIT,
    Adapter,
    Attention,
    Between,
    Block,
    Mlp,
    Places,
    Taps,
    through_blocks,
)

Fields = dict[str, Any]

CLS = ("none", "plain", "placed")
POOLS = ("cls", "mean", "map")


class Transformer(nn.Module):
    """A sequence of blocks and a final norm; `block` holds the fields of the blocks, for the others see `ViT`."""

    depth: int
    block: Mapping[str, Any]
    between: Between | None
    taps: tuple[int, ...]
    remat: str
    drop_rate: float = 0.0
    last: str = ""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        places: Places,
        prompts: Float[Array, "j m d"] | None = None,
        valid: Bool[Array, "b n"] | None = None,
    ) -> tuple[Float[Array, "b _ d"], Places, Taps]:
        """Applies the blocks, see `through_blocks`, and the final norm.

        Before block i, from 1 on, prompts[i], if it exists, replaces the last M tokens.
        """
        block_type = rematerialise(Block, self.remat)

        def before(i: int, x: Array) -> Array:
            if prompts is not None and 1 <= i < len(prompts):
                return _append(x[:, : -prompts.shape[1]], prompts[i])
            return x

        x, places, tapped = through_blocks(
            lambda i: block_type(
                **self.block,
                drop_rate=self.drop_rate * i / max(self.depth - 1, 1),
                last=self.last if i == self.depth - 1 else "",
                name=f"encoderblock_{i}",
            ),
            self.depth,
            x,
            places,
            valid=valid,
            between=self.between,
            before=before,
            taps=self.taps,
        )
        norm = nn.LayerNorm(self.block["epsilon"], dtype=self.block["dtype"], name="encoder_norm")
        return norm(x), places, tapped


class MAPHead(nn.Module):
    """A pooling head with one learned query (Zhai et al., Scaling Vision Transformers, 2021); see `ViT`."""

    heads: int
    mlp_dim: int
    activation: str
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], valid: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b d"]:
        """Pools all tokens, or those that are `valid`, into one."""
        probe = self.param("probe", VIT.kernel_init, (1, 1, x.shape[-1]))
        probe = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, x.shape[-1]))
        x = Attention(self.heads, VIT, dtype=self.dtype, name=VIT.attention)(probe, x, valid)
        y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="LayerNorm_0")(x)
        return (x + Mlp(self.mlp_dim, self.activation, VIT, dtype=self.dtype, name=VIT.mlp)(y))[:, 0]


class ViT(nn.Module):
    """A Vision Transformer for images of any size.

    Attributes:
      patch: side of a patch in pixels.
      width: channels of a token.
      depth: number of blocks.
      heads: number of attention heads; divides `width`.
      mlp_dim: width inside the MLPs.
      grid: rows and columns of the position table, which is resized for other images.
      resize: the method of resizing, see `resize_positions`.
      cls: the class token: "none"; "plain", without a position (big_vision); "placed", with the first row of the
        position table (DINO, MAE, CLIP).
      front: the number of class tokens, if there are any; those after the first have no position (TIPS).
      pool: the embedding of the image: "cls", the first class token; "mean", the mean of the patch tokens; "map", the
        output of a learned query (`MAPHead`). All after the final norm.
      pre_norm: whether there is a norm before the blocks and no bias of the patch embedding, as in CLIP.
      activation: "gelu"; "gelu_tanh", its approximation; "quick_gelu", x sigmoid(1.702 x); "swiglu", see
        `transformer.Mlp`, whose hidden width is `mlp_dim`.
      epsilon: epsilon of all layer norms.
      embed_dim: channels of the embedding, by the projection `head`; 0 for no projection.
      head_bias: whether that projection has a bias (big_vision: yes, CLIP: no).
      taps: numbers of the blocks, from 0, whose tokens are returned.
      adapter, adapter_scale: modules beside the branches of each block, see `transformer.Block`.
      between: a function on the patch tokens between two blocks, see `transformer.Between`.
      last: how patch tokens attend in the last block, see `transformer.Block`. Only for pool="cls"; `pooled` is the
        same for all.
      drop_rate: stochastic depth in training: both branches of block i of n are dropped with probability
        drop_rate * i / (n-1).
      remat: what the backward pass recomputes in each block, see `rematerialise`.
      dtype: compute type; parameters are float32.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    grid: tuple[int, int] = (14, 14)
    resize: str = "bicubic"
    cls: str = "placed"
    front: int = 1
    pool: str = "cls"
    pre_norm: bool = False
    activation: str = "gelu"
    epsilon: float = 1e-6
    embed_dim: int = 0
    head_bias: bool = True
    taps: tuple[int, ...] = ()
    adapter: Adapter | None = None
    adapter_scale: float = 1.0
    between: Between | None = None
    last: str = ""
    drop_rate: float = 0.0
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b h w 3"],
        train: bool = False,
        prompts: Float[Array, "j m d"] | None = None,
        inside: Bool[Array, "b _r _c"] | None = None,
    ) -> TowerOutput:
        """Computes the embedding, the tokens and the taps.

        Args:
          image: normalised images; their sides are multiples of `patch`.
          train: whether stochastic depth is on (needs the rng `dropout`).
          prompts: learned tokens, which are not part of the outputs (VPT, Jia et al. 2022). prompts[0] is appended to
            the patches, before `pre_norm` as in muzairkhattak/multimodal-prompt-learning; prompts[i] replaces these
            tokens before block i. After the last of them the tokens pass through the remaining blocks.
          inside: the patches that may be attended to; None means all. Not with `between`.

        Raises:
          UserError: a side is not a multiple of the patch, or fields do not fit each other.
        """
        self._check_fields()
        _check_sides(image.shape[1], image.shape[2], self.patch)
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            padding="VALID",
            use_bias=not self.pre_norm,
            dtype=self.dtype,
            name="embedding",
        )(image.astype(self.dtype))
        b, h, w, _ = x.shape

        first = int(self.cls == "placed")
        rows, columns = self.grid
        table_init = nn.initializers.normal(self.width**-0.5)
        table = self.param("pos_embedding", table_init, (1, first + rows * columns, self.width))
        patches = table[0, first:].reshape(rows, columns, self.width)
        x = x + resize_positions(patches, (h, w), self.resize).astype(self.dtype)
        x = x.reshape(b, h * w, self.width)
        if self.cls != "none":
            cls = self.param("cls", nn.initializers.zeros, (1, self.front, self.width))
            cls = cls.at[:, :1].add(table[:, :1]) if self.cls == "placed" else cls
            cls = jnp.broadcast_to(cls.astype(self.dtype), (b, self.front, self.width))
            x = jnp.concatenate([cls, x], axis=1)
        if prompts is not None:
            x = _append(x, prompts[0])
        if self.pre_norm:
            x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="pre_norm")(x)

        block = dict(
            heads=self.heads,
            hidden=self.mlp_dim,
            activation=self.activation,
            epsilon=self.epsilon,
            style=VIT,
            adapter=self.adapter,
            adapter_scale=self.adapter_scale,
            dtype=self.dtype,
        )
        front = self.front if self.cls != "none" else 0
        drop_rate = self.drop_rate if train else 0.0
        transformer = Transformer(
            self.depth,
            block,
            self.between,
            self.taps,
            self.remat,
            drop_rate,
            self.last,
            name="Transformer",
        )
        valid = visible(inside, front, x.shape[1])
        x, places, tapped = transformer(x, Places((h, w), front), prompts, valid)
        x = places.unfold(x)

        def on_grid(tokens: jax.Array) -> jax.Array:
            return tokens[:, front:].reshape(b, h, w, self.width)

        if self.pool == "map":
            pooled = self._map_head()(x, visible(inside, front, x.shape[1]))
        elif self.pool == "cls":
            pooled = x[:, 0]
        else:
            pooled = on_grid(x).mean((1, 2), where=None if inside is None else inside[..., None])
        if self.embed_dim:
            pooled = nn.Dense(self.embed_dim, use_bias=self.head_bias, dtype=self.dtype, name="head")(pooled)
        return TowerOutput(
            pooled, on_grid(x), {i: on_grid(p.unfold(tokens)) for i, (tokens, p) in tapped.items()}
        )

    @nn.compact
    def pool_map(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """Pools tokens by the head of pool="map" alone; called by `apply(..., method="pool_map")`."""
        return self._map_head()(x)

    def _map_head(self) -> MAPHead:
        fields = self.heads, self.mlp_dim, self.activation, self.epsilon, self.dtype
        return MAPHead(*fields, name="MAPHead_0")

    def _check_fields(self) -> None:
        _check("cls", self.cls, CLS)
        _check("pool", self.pool, POOLS)
        _check("activation", self.activation, (*ACTIVATIONS, "swiglu"))
        _check("last", self.last, LAST)
        if self.front < 1:
            raise UserError(f"front={self.front} of the ViT is less than 1: for no class token, cls='none'")
        if self.pool != "mean" and (self.pool == "cls") != (self.cls != "none"):
            raise UserError(f"pool={self.pool!r} of the ViT cannot be combined with cls={self.cls!r}")
        if self.last and self.pool != "cls":
            raise UserError(f"a ViT with pool={self.pool!r} has no value features: its pool must be 'cls'")
        if self.width % self.heads:
            raise UserError(f"the ViT's width {self.width} is not a multiple of its {self.heads} heads")
        if missing := [i for i in self.taps if i not in range(self.depth)]:
            raise UserError(f"taps={missing} do not exist in the ViT, which has blocks 0 to {self.depth - 1}")


def _append(x: Float[Array, "b n d"], tokens: Float[Array, "m d"]) -> Float[Array, "b n+m d"]:
    """Appends the same tokens to those of every image."""
    tokens = jnp.broadcast_to(tokens.astype(x.dtype), (x.shape[0], *tokens.shape))
    return jnp.concatenate([x, tokens], axis=1)


def _check(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{field}={value!r} of the ViT is not one of {', '.join(known)}")


def _check_sides(height: int, width: int, patch: int) -> None:
    if height % patch or width % patch:
        raise UserError(
            f"an image of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}: "
            f"resize or pad it to multiples of {patch}"
        )


_S: Fields = dict(width=384, depth=12, heads=6, mlp_dim=1536)
_B: Fields = dict(width=768, depth=12, heads=12, mlp_dim=3072)
_L: Fields = dict(width=1024, depth=24, heads=16, mlp_dim=4096)
_H: Fields = dict(width=1280, depth=32, heads=16, mlp_dim=5120)
_SO400M: Fields = dict(width=1152, depth=27, heads=16, mlp_dim=4304)
_DINO: Fields = dict(resize="dino")
_CLIP: Fields = dict(pre_norm=True, activation="quick_gelu", epsilon=1e-5, head_bias=False)
# open_clip's own models (LAION, DataComp) only differ from CLIP's in the GELU.
_OPEN_CLIP: Fields = dict(_CLIP, activation="gelu")
# With layer scale in the projections, see `pretrained.tips`.
_TIPS: Fields = dict(patch=14, grid=(32, 32), cls="plain", front=2, resize="triangle")
_SIGLIP: Fields = dict(activation="gelu_tanh", resize="bilinear", cls="none", pool="map")

# Fields of `ViT` by model: `ViT(**PRESETS["dino_vits8"])`. A number at the end is the image's side, if not 224. 384 is
# not a multiple of so400m's patch: the published model ignores the last pixels and uses 378.
PRESETS: dict[str, Fields] = {
    # Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021.
    "dino_vits8": dict(_S, **_DINO, patch=8, grid=(28, 28)),
    "dino_vits16": dict(_S, **_DINO, patch=16, grid=(14, 14)),
    "dino_vitb8": dict(_B, **_DINO, patch=8, grid=(28, 28)),
    "dino_vitb16": dict(_B, **_DINO, patch=16, grid=(14, 14)),
    # He et al., Masked Autoencoders Are Scalable Vision Learners, 2022: the encoder, applied to all patches.
    "mae_vitb16": dict(_B, patch=16, grid=(14, 14)),
    "mae_vitl16": dict(_L, patch=16, grid=(14, 14)),
    "mae_vith14": dict(_H, patch=14, grid=(16, 16)),
    # Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
    "clip_vitb32": dict(_B, **_CLIP, patch=32, grid=(7, 7), embed_dim=512),
    "clip_vitb16": dict(_B, **_CLIP, patch=16, grid=(14, 14), embed_dim=512),
    "clip_vitl14": dict(_L, **_CLIP, patch=14, grid=(16, 16), embed_dim=768),
    "clip_vitl14_336": dict(_L, **_CLIP, patch=14, grid=(24, 24), embed_dim=768),
    # Cherti et al., Reproducible Scaling Laws for Contrastive Language-Image Learning, 2023.
    "openclip_vitb32": dict(_B, **_OPEN_CLIP, patch=32, grid=(7, 7), embed_dim=512),
    "openclip_vitb16": dict(_B, **_OPEN_CLIP, patch=16, grid=(14, 14), embed_dim=512),
    "openclip_vitl14": dict(_L, **_OPEN_CLIP, patch=14, grid=(16, 16), embed_dim=768),
    "openclip_vith14": dict(_H, **_OPEN_CLIP, patch=14, grid=(16, 16), embed_dim=1024),
    # Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023; SigLIP 2 (2025) has the same image towers.
    "siglip_vitb16": dict(_B, **_SIGLIP, patch=16, grid=(14, 14)),
    "siglip_vitb16_256": dict(_B, **_SIGLIP, patch=16, grid=(16, 16)),
    "siglip_vitb16_384": dict(_B, **_SIGLIP, patch=16, grid=(24, 24)),
    "siglip_vitb16_512": dict(_B, **_SIGLIP, patch=16, grid=(32, 32)),
    "siglip_vitl16_256": dict(_L, **_SIGLIP, patch=16, grid=(16, 16)),
    "siglip_vitl16_384": dict(_L, **_SIGLIP, patch=16, grid=(24, 24)),
    "siglip_so400m14": dict(_SO400M, **_SIGLIP, patch=14, grid=(16, 16)),
    "siglip_so400m14_384": dict(_SO400M, **_SIGLIP, patch=14, grid=(27, 27)),
    # TIPSv2 (Cao et al. 2026), shapes: google-deepmind/tips, scenic/models/vit.py. A SwiGLU has two thirds of the
    # width, in steps of 8.
    "tipsv2_b14": dict(_B, **_TIPS),
    "tipsv2_l14": dict(_L, **_TIPS),
    "tipsv2_so400m14": dict(_SO400M, **_TIPS),
    "tipsv2_g14": dict(_TIPS, width=1536, depth=40, heads=24, mlp_dim=4096, activation="swiglu"),
}
