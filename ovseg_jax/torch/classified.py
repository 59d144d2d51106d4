"""MaskFormer and Mask2Former with their classifier, see `MaskFormer` of `ovseg_jax/models/maskformer.py`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ovseg_jax.torch.mask2former import Mask2FormerNet
from ovseg_jax.torch.maskformer import MaskFormerNet

NETS: dict[str, Any] = {kind.__name__: kind for kind in (MaskFormerNet, Mask2FormerNet)}


class MaskFormerOutput(NamedTuple):
    """The outputs of the last layer.

    Attributes:
      mask_logits: [B N h w].
      regions: [B N K], the probability of each class.
      void: [B N], that of "no object".
    """

    mask_logits: Tensor
    regions: Tensor
    void: Tensor


class QueryClassifier(nn.Module):
    """A linear classifier of queries into K classes and "no object"."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.dense = nn.Linear(width, classes + 1)

    def forward(self, queries: Tensor) -> Tensor:
        """Returns logits [b n K+1]."""
        return self.dense(queries.float())


class MaskFormer(nn.Module):
    """The whole MaskFormer or Mask2Former.

    Args:
      model: the Flax module's fields, as `pretrained.to_torch.describe` returns them.
    """

    def __init__(self, model: Mapping[str, Any]):
        super().__init__()
        net: Any = NETS[model["net"].get("kind", MaskFormerNet.__name__)](model["net"])
        self.net, self.classifier = net, QueryClassifier(net.width, model["classifier"]["classes"])

    def forward(self, image: Tensor, image_size: Tensor) -> MaskFormerOutput:
        """Segments uint8 images [b 3 s t] that fill `image_size` [b 2] (height, width) of their canvas."""
        queries, mask_logits = self.net(image, image_size)
        share = torch.softmax(self.classifier(queries), -1)
        return MaskFormerOutput(mask_logits, share[..., :-1], share[..., -1])
