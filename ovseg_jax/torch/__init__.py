"""The models in PyTorch, without JAX: `ovseg_jax.torch.load(DIR).segment(image, labels)`.

A module's attributes carry the names of its Flax twin's parameters; `pretrained/to_torch.py` changes the layouts.
"""

from ovseg_jax.torch.segmenter import Segmenter, load

__all__ = ["Segmenter", "load"]
