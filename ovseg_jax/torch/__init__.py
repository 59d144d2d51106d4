"""The models in PyTorch, without JAX: `ovseg_jax.torch.load(DIR).segment(image, labels)`.

The attributes of a module have the names of the Flax module's parameters; `pretrained/to_torch.py` converts the
layouts.
"""

from ovseg_jax.torch.segmenter import Segmenter, load

__all__ = ["Segmenter", "load"]
