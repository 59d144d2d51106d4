"""P-Seg's image network and its text side for inference, see `models/pseg.py` and `towers/text_transformer.py`."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_jax.torch.layers import BatchNorm, unit
from ovseg_jax.torch.maskformer import MaskFormerNet, cells_inside
from ovseg_jax.torch.openseg import OpenSegFeatures
from ovseg_jax.torch.text_towers import CLIPText


class Projection(nn.Module):
    """An MLP of two layers into the common space, with or without batch normalisation."""

    def __init__(self, inputs: int, features: int, hidden: int, norm: bool):
        super().__init__()
        self.Dense_0, self.Dense_1 = nn.Linear(inputs, hidden), nn.Linear(hidden, features)
        self.norm = BatchNorm(hidden, 1e-5) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps each vector [n d]."""
        return self.Dense_1(F.relu(self.norm(self.Dense_0(x))))


class PSegNet(nn.Module):
    """P-Seg's network; `model` are the Flax module's fields, as `pretrained.to_torch.describe` returns them."""

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        self.net, self.num_queries = MaskFormerNet(model["net"]), model["net"]["num_queries"]
        sizes = model["embed_dim"], model["projection_hidden"], model["projection_norm"]
        self.projection = Projection(model["net"]["width"], *sizes)

    def forward(self, image: Tensor, image_size: Tensor) -> OpenSegFeatures:
        """Segments uint8 images [b 3 s t]; `region_sum` holds the projected query of each mask."""
        queries, mask_logits = self.net(image, image_size)
        masks = mask_logits.sigmoid() * cells_inside(image_size, mask_logits, "c2")[:, None]
        regions = self.projection(queries.float().flatten(0, 1)).unflatten(0, queries.shape[:2])
        pixels = torch.einsum("bnhw,bnd->bdhw", masks, unit(regions))
        return OpenSegFeatures(mask_logits, regions, pixels)


class TextNet(nn.Module):
    """CLIP's text transformer and a projection of its end token.

    Args:
      tower: the fields of `CLIPText`.
      projection: the fields of the projection.
    """

    def __init__(self, tower: Mapping[str, Any], projection: Mapping[str, Any]):
        super().__init__()
        self.tower = CLIPText(**{key: value for key, value in tower.items() if key != "kind"})
        sizes = projection["features"], projection["hidden"], projection["norm"]
        self.projection = Projection(tower["width"], *sizes)

    @property
    def length(self) -> int:
        """The maximum number of tokens of a text."""
        return self.tower.length

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Embeds texts [b l], each by its end; `valid` is not used.

        Raises:
          UserError: texts are too long.
        """
        return self.projection(self.tower(ids).float())
