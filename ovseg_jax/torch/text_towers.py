"""CLIP's, SigLIP's and TIPS's text towers and BERT for inference, see `ovseg_jax/models/text_towers.py`."""

import math

import torch
from torch import Tensor, nn

from ovseg_jax.errors import UserError
from ovseg_jax.torch.transformer import Encoder


class TextTower(nn.Module):
    """A base class of text towers, with tables of tokens and of positions."""

    def __init__(self, vocab_size: int, length: int, width: int):
        super().__init__()
        self.Embed_0 = nn.Embedding(vocab_size, width)
        self.pos_embedding = nn.Parameter(torch.zeros(1, length, width))

    @property
    def length(self) -> int:
        """The maximum number of tokens of a text."""
        return self.pos_embedding.shape[1]

    def embed(self, ids: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns tokens with their positions, [b l d]; id -1 - i is vector i of a learned `context` [m d]."""
        if ids.shape[1] > self.length:
            raise UserError(
                f"texts have {ids.shape[1]} tokens, but this text tower takes at most {self.length}"
            )
        x = self.Embed_0(ids.clamp(min=0))
        if context is not None:
            x = torch.where(ids[..., None] < 0, context[(-1 - ids).clamp(min=0)].to(x.dtype), x)
        return x + self.pos_embedding[:, : ids.shape[1]]


class CLIPText(TextTower):
    """CLIP's text tower, also that of open_clip and EVA-CLIP."""

    def __init__(
        self,
        vocab_size: int = 49408,
        length: int = 77,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        mlp_dim: int | None = None,
        embed_dim: int = 512,
        activation: str = "quick_gelu",
    ):
        super().__init__(vocab_size, length, width)
        self.Encoder_0 = Encoder(layers, width, heads, mlp_dim or 4 * width, activation, 1e-5, causal=True)
        self.head = nn.Linear(width, embed_dim, bias=False) if embed_dim else nn.Identity()

    def forward(self, ids: Tensor, valid: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Embeds texts [b l], each by its end, the first token with the highest id; `valid` is not used.

        `context` is that of a learned prompt, see `embed`.

        Raises:
          UserError: texts are too long.
        """
        x, _ = self.Encoder_0(self.embed(ids, context))
        end = ids.argmax(-1)[:, None, None].expand(-1, 1, x.shape[2])
        return self.head(x.gather(1, end)[:, 0])


class SiglipText(TextTower):
    """SigLIP's text tower, and SigLIP 2's."""

    def __init__(
        self,
        vocab_size: int = 32_000,
        length: int = 64,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_dim: int | None = None,
        embed_dim: int = 768,
    ):
        super().__init__(vocab_size, length, width)
        self.Encoder_0 = Encoder(layers, width, heads, mlp_dim or 4 * width, "gelu_tanh", 1e-6)
        self.head = nn.Linear(width, embed_dim)

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Embeds texts [b l], each by its last position, padding or not; `valid` is not used.

        Raises:
          UserError: texts are too long.
        """
        x, _ = self.Encoder_0(self.embed(ids))
        return self.head(x[:, -1])


class TipsText(nn.Module):
    """The text tower of TIPS; its positions are fixed."""

    def __init__(
        self,
        vocab_size: int = 32_000,
        length: int = 64,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_dim: int | None = None,
        epsilon: float = 1e-5,
    ):
        super().__init__()
        self.length, self.width = length, width
        self.Embed_0 = nn.Embedding(vocab_size, width)
        self.Encoder_0 = Encoder(layers, width, heads, mlp_dim or 4 * width, "relu", epsilon)

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Embeds texts [b l] as the mean of their tokens; `valid` [b l] marks those that are not padding, None all.

        Raises:
          UserError: texts are too long.
        """
        if ids.shape[1] > self.length:
            raise UserError(
                f"texts have {ids.shape[1]} tokens, but this text tower takes at most {self.length}"
            )
        half, place = self.width // 2, torch.arange(ids.shape[1], device=ids.device, dtype=torch.float64)
        rates = torch.exp(
            torch.arange(half, device=ids.device, dtype=torch.float64) * (-math.log(1e4) / max(half - 1, 1))
        )
        angles = place[:, None] * rates
        positions = nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, self.width % 2))
        x = self.Embed_0(ids)
        x, _ = self.Encoder_0(x * self.width**0.5 + positions.to(x.dtype), valid)
        valid = torch.ones_like(ids) if valid is None else valid
        weights = valid.float() / valid.float().sum(1, keepdim=True)
        return (weights[:, None] @ x.float())[:, 0].to(x.dtype)


class Bert(TextTower):
    """BERT for single texts: the token type is always 0."""

    def __init__(
        self,
        vocab_size: int = 30_522,
        length: int = 512,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_dim: int | None = None,
        pool: str = "cls",
    ):
        super().__init__(vocab_size, length, width)
        self.pool = pool
        self.type_embedding = nn.Parameter(torch.zeros(2, width))
        self.embedding_norm = nn.LayerNorm(width, 1e-12)
        self.Encoder_0 = Encoder(layers, width, heads, mlp_dim or 4 * width, "gelu", 1e-12, post_norm=True)
        self.pooler = nn.Linear(width, width) if pool == "pooler" else None

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Embeds texts [b l]; `valid` [b l] marks the tokens that are not padding, None means all.

        Raises:
          UserError: texts are too long.
        """
        x, _ = self.Encoder_0(self.embedding_norm(self.embed(ids) + self.type_embedding[0]), valid)
        if self.pool == "mean":
            valid = torch.ones_like(ids) if valid is None else valid
            weights = valid.float() / valid.float().sum(1, keepdim=True)
            return (weights[:, None] @ x.float())[:, 0].to(x.dtype)
        return x[:, 0] if self.pooler is None else torch.tanh(self.pooler(x[:, 0]))
