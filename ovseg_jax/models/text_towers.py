"""Text towers of published models: CLIP's, SigLIP's, TIPS's and BERT.

Parameters follow big_vision's text transformer: `Embed_0`, `pos_embedding` [1 l d], `Encoder_0/encoderblock_{i}` with
`LayerNorm_{0,1}`, `MultiHeadDotProductAttention_0/{query,key,value,out}` and `MlpBlock_0/Dense_{0,1}`,
`Encoder_0/encoder_norm`, `head`. ovseg_jax/pretrained/text.py has the names of others.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.errors import UserError
from ovseg_jax.models.remat import rematerialise
from ovseg_jax.models.transformer import ACTIVATIONS, TEXT, Adapter, Block, scan_blocks

_table_init = nn.initializers.normal(0.02)


class TextOutput(NamedTuple):
    """The output of a text tower, in its compute type.

    Attributes:
      pooled: the embedding of the whole text, as in the published model; not normalised.
      tokens: the tokens after the last layer and its norm.
    """

    pooled: Float[Array, "b e"]
    tokens: Float[Array, "b l d"]


# Called after a block with its number and all tokens; returns as many, since a text is pooled at its place.
Between = Callable[[int, Float[Array, "b l d"]], Float[Array, "b l d"]]


class _Encoder(nn.Module):
    """A sequence of blocks with the fields `block`, and a final norm unless blocks end in one."""

    layers: int
    block: Mapping[str, Any]
    remat: str
    scan: bool
    between: Between | None

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], valid: Bool[Array, "b l"] | None) -> Float[Array, "b l d"]:
        block = rematerialise(Block, self.remat)
        alike = self.between is None and self.block["adapter"] is None
        loop = self.scan and alike and not self.is_initializing()
        if loop:
            weights = [self.variables["params"][f"encoderblock_{i}"] for i in range(self.layers)]
            x = scan_blocks(Block(**self.block, parent=None), self.remat, weights, x, valid)
        for i in range(0 if loop else self.layers):
            x = block(**self.block, name=f"encoderblock_{i}")(x, valid)
            if self.between is not None and i < self.layers - 1:
                x, shape = self.between(i, x), x.shape
                if x.shape != shape:
                    raise ValueError(f"`between` returned tokens {x.shape} for {shape}")
        norm = nn.LayerNorm(self.block["epsilon"], self.block["dtype"], name="encoder_norm")
        return x if self.block.get("order") == "sum" else norm(x)


class TextTower(nn.Module):
    """A base class of text towers, with tables of tokens and of positions.

    Attributes:
      tokens: the kind of the tower's tokeniser where its files do not tell, see `vocab.tokenizers.load_tokenizer`.
      padded: whether texts must be padded to `length`, since padding has an effect.
      vocab_size: rows of the token table.
      length: rows of the position table, the maximum number of tokens of a text.
      width, layers, heads, mlp_dim: sizes of the encoder; `mlp_dim` None means 4 times `width`.
      remat: what the backward pass recomputes in each block, see `rematerialise`.
      scan: whether the blocks run as one loop and compile once; no effect with adapters or `between`.
      dtype: compute type; parameters are float32.
      adapter, adapter_scale: modules beside the branches of each block, see `transformer.Block`; their places are None.
      between: a function on the tokens between two blocks, see `Between`.
    """

    tokens: ClassVar[str | None] = None
    padded: ClassVar[bool] = False

    vocab_size: int = 49408
    length: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_dim: int | None = None
    remat: str = "none"
    scan: bool = False
    dtype: Any = jnp.float32
    adapter: Adapter | None = None
    adapter_scale: float = 1.0
    between: Between | None = None

    def setup(self) -> None:
        """Creates the token table, which `embed` and the tower share."""
        self.Embed_0 = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, embedding_init=_table_init)

    def embed(self, ids: Int[Array, "*n"]) -> Float[Array, "*n d"]:
        """Returns the token table's rows, without positions; called by `apply(..., method="embed")`."""
        return self.Embed_0(ids)

    def _check_length(self, x: Array) -> None:
        if x.shape[1] > self.length:
            raise UserError(
                f"texts have {x.shape[1]} tokens, but this text tower takes at most {self.length}"
            )

    def _add_positions(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        self._check_length(x)
        positions = self.param("pos_embedding", _table_init, (1, self.length, self.width))
        return x.astype(self.dtype) + positions[:, : x.shape[1]].astype(self.dtype)

    def _encode(self, x: Array, valid: Array | None, **block: Any) -> Float[Array, "b l d"]:
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads do not divide the text tower's width of {self.width}")
        if block["activation"] not in ACTIVATIONS:
            raise UserError(
                f"activation={block['activation']!r} of the text tower is not one of {', '.join(ACTIVATIONS)}"
            )
        hidden = self.mlp_dim or 4 * self.width
        block |= dict(heads=self.heads, hidden=hidden, style=TEXT, dtype=self.dtype)
        block |= dict(adapter=self.adapter, adapter_scale=self.adapter_scale)
        return _Encoder(self.layers, block, self.remat, self.scan, self.between, name="Encoder_0")(x, valid)


class CLIPText(TextTower):
    """CLIP's text tower (Radford et al. 2021), also that of open_clip and EVA-CLIP.

    Attributes:
      embed_dim: width of the space that it shares with the images; 0 for no projection.
      activation: "quick_gelu" for OpenAI's weights, and others trained with it; else "gelu".
    """

    embed_dim: int = 512
    activation: str = "quick_gelu"

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b l"] | None,
        valid: Bool[Array, "b l"] | None = None,
        embeddings: Float[Array, "b l d"] | None = None,
    ) -> TextOutput:
        """Embeds texts, each by its end token; attention is causal, so tokens after it need no mask.

        Args:
          ids: tokens; the end of the text is the first token with the highest id, CLIP's end-of-text token.
          valid: mask of the tokens up to and including the end; only used if `ids` is None.
          embeddings: token vectors to use in place of `embed(ids)`, such as learned prompts (CoOp, POMP).

        Raises:
          UserError: texts are too long, or there are neither ids nor embeddings with `valid`.
        """
        if ids is not None:
            end = jnp.argmax(ids, -1)
            x = self.embed(ids) if embeddings is None else embeddings
        elif embeddings is not None and valid is not None:
            end = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], -1)
            x = embeddings
        else:
            raise UserError(
                "CLIPText needs ids, or embeddings with `valid`, which marks the end of each text"
            )
        x = self._add_positions(x)
        x = self._encode(x, None, activation=self.activation, epsilon=1e-5, causal=True)
        pooled = jnp.take_along_axis(x, end[:, None, None], 1)[:, 0]
        if self.embed_dim:
            pooled = nn.Dense(self.embed_dim, use_bias=False, dtype=self.dtype, name="head")(pooled)
        return TextOutput(pooled, x)


class SiglipText(TextTower):
    """SigLIP's text tower (Zhai et al. 2023; big_vision), and SigLIP 2's (Tschannen et al. 2025)."""

    padded: ClassVar[bool] = True

    vocab_size: int = 32_000
    length: int = 64
    width: int = 768
    heads: int = 12
    embed_dim: int = 768

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], valid: Bool[Array, "b l"] | None = None) -> TextOutput:
        """Embeds texts, each by its last position, padding or not.

        Args:
          ids: tokens, padded to the length of the published model, which was only trained on that length.
          valid: not used, since the published models attend to padding too.

        Raises:
          UserError: texts are too long.
        """
        x = self._encode(self._add_positions(self.embed(ids)), None, activation="gelu_tanh", epsilon=1e-6)
        return TextOutput(nn.Dense(self.embed_dim, dtype=self.dtype, name="head")(x[:, -1]), x)


class TipsText(TextTower):
    """The text tower of TIPS (Maninis et al. 2024) and TIPSv2 (Cao et al. 2026); its positions are fixed.

    Attributes:
      epsilon: epsilon of all norms: 1e-5 in the published PyTorch code and in transformers, 1e-6 in the JAX code.
    """

    tokens: ClassVar[str | None] = "tips"

    vocab_size: int = 32_000
    length: int = 64
    width: int = 768
    heads: int = 12
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], valid: Bool[Array, "b l"] | None = None) -> TextOutput:
        """Embeds texts as the mean of their tokens.

        Args:
          ids: tokens.
          valid: mask of the tokens that are not padding; None means all.

        Raises:
          UserError: texts are too long.
        """
        self._check_length(ids)
        x = self.embed(ids) * self.width**0.5
        x = x.astype(self.dtype) + jnp.asarray(sinusoids(ids.shape[1], self.width), self.dtype)
        x = self._encode(x, valid, activation="relu", epsilon=self.epsilon)
        where = None if valid is None else valid[..., None]
        return TextOutput(jnp.mean(x, 1, jnp.float32, where=where).astype(self.dtype), x)


def sinusoids(length: int, width: int) -> Float[np.ndarray, "l d"]:
    """Returns fixed positions: sines, then cosines, of geometric wavelengths (google-deepmind/tips, scenic)."""
    half = width // 2
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(half) / max(half - 1, 1))
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)], 1), ((0, 0), (0, width % 2)))


class Bert(TextTower):
    """BERT (Devlin et al. 2018) for single texts: the token type is always 0.

    Beside the names above it has `type_embedding` [2 d], `embedding_norm` and, if it is used, `pooler`.

    Attributes:
      pool: "cls" returns the first token, "pooler" a dense layer with tanh of it, "mean" the mean of valid tokens.
    """

    vocab_size: int = 30_522
    length: int = 512
    width: int = 768
    heads: int = 12
    pool: str = "cls"

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], valid: Bool[Array, "b l"] | None = None) -> TextOutput:
        """Embeds texts.

        Args:
          ids: tokens.
          valid: mask of the tokens that are not padding; None means all.

        Raises:
          UserError: texts are too long, or the pooling is unknown.
        """
        if self.pool not in ("cls", "pooler", "mean"):
            raise UserError(f"pool={self.pool!r} of BERT is not one of cls, pooler, mean")
        types = self.param("type_embedding", _table_init, (2, self.width))
        x = self._add_positions(self.embed(ids)) + types[0].astype(self.dtype)
        x = nn.LayerNorm(1e-12, self.dtype, name="embedding_norm")(x)
        x = self._encode(x, valid, activation="gelu", epsilon=1e-12, order="sum")
        if self.pool == "mean":
            where = None if valid is None else valid[..., None]
            return TextOutput(jnp.mean(x, 1, jnp.float32, where=where).astype(self.dtype), x)
        pooled = x[:, 0]
        if self.pool == "pooler":
            pooled = jnp.tanh(nn.Dense(self.width, dtype=self.dtype, name="pooler")(pooled))
        return TextOutput(pooled, x)


_medium: dict[str, Any] = dict(width=768, heads=12, embed_dim=768)
_large: dict[str, Any] = dict(width=1024, layers=24, heads=16)
_so400m: dict[str, Any] = dict(width=1152, layers=27, heads=16, mlp_dim=4304, embed_dim=1152)
_gelu: dict[str, Any] = dict(activation="gelu")
_gemma: dict[str, Any] = dict(vocab_size=256_000)

PRESETS: dict[str, tuple[type[TextTower], dict[str, Any]]] = {
    **dict.fromkeys(("clip_vitb32", "clip_vitb16", "clip_rn101"), (CLIPText, {})),
    "openclip_vitb16": (CLIPText, _gelu),
    "openclip_vitl14": (CLIPText, _medium | _gelu),
    "openclip_vith14": (CLIPText, _large | _gelu | dict(embed_dim=1024)),
    **dict.fromkeys(("clip_vitl14", "clip_vitl14_336", "clip_rn50x16"), (CLIPText, _medium)),
    "clip_rn50": (CLIPText, dict(embed_dim=1024)),
    "clip_rn50x4": (CLIPText, dict(width=640, heads=10, embed_dim=640)),
    "clip_rn50x64": (CLIPText, _large | dict(layers=12, embed_dim=1024)),
    "clip_convnext_base": (CLIPText, _gelu),
    **dict.fromkeys(
        ("clip_convnext_base_w", "clip_convnext_base_w_320"),
        (CLIPText, _gelu | dict(width=640, heads=10, embed_dim=640)),
    ),
    **dict.fromkeys(
        ("clip_convnext_large_d", "clip_convnext_large_d_320"), (CLIPText, _medium | _gelu | dict(layers=16))
    ),
    "clip_convnext_xxlarge": (CLIPText, _large | _gelu | dict(embed_dim=1024)),
    "eva01_clip_g14": (CLIPText, _medium | _gelu | dict(embed_dim=1024)),
    "eva02_clip_b16": (CLIPText, _gelu),
    **dict.fromkeys(("eva02_clip_l14", "eva02_clip_l14_336"), (CLIPText, _medium | _gelu)),
    "eva02_clip_e14": (CLIPText, _large | _gelu | dict(embed_dim=1024)),
    "eva02_clip_e14_plus": (CLIPText, _gelu | dict(width=1280, layers=32, heads=20, embed_dim=1024)),
    "siglip_base": (SiglipText, {}),
    "siglip_large": (SiglipText, _large | dict(embed_dim=1024)),
    "siglip_so400m": (SiglipText, _so400m),
    "siglip_so400m_224": (SiglipText, _so400m | dict(length=16)),
    "siglip2_base": (SiglipText, _gemma),
    "siglip2_large": (SiglipText, _large | _gemma | dict(embed_dim=1024)),
    "siglip2_so400m": (SiglipText, _so400m | _gemma),
    "siglip2_giant": (SiglipText, _so400m | _gemma | dict(embed_dim=1536)),
    # google-deepmind/tips, scenic/models/tips.py: all have 12 layers but So400m, whose towers are alike.
    "tipsv2_b14": (TipsText, {}),
    "tipsv2_l14": (TipsText, dict(width=1024, heads=16)),
    "tipsv2_so400m14": (TipsText, dict(width=1152, layers=27, heads=16, mlp_dim=4304)),
    "tipsv2_g14": (TipsText, dict(width=1536, heads=24)),
    "bert_base": (Bert, {}),
    "bert_large": (Bert, _large),
}


def text_tower(name: str, **fields: Any) -> TextTower:
    """Creates a published tower, with random weights and some of its fields changed.

    Args:
      name: a key of PRESETS.
      **fields: such as `dtype`, `remat`, or `activation="gelu"` for CLIPs that were not trained with quick_gelu.

    Raises:
      UserError: the name is unknown.
    """
    if name not in PRESETS:
        raise UserError(f"the text tower {name!r} is not one of {', '.join(PRESETS)}")
    tower, published = PRESETS[name]
    return tower(**(published | fields))
