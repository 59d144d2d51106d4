"""Open-vocabulary segmentation in JAX, from a laptop to a TPU pod."""

__version__ = "0.1.0"
__all__ = ["Segmenter", "UserError"]


def __getattr__(name: str):
    """Imports a public name when it is first used, so that `import ovseg_jax` alone stays fast."""
    if name == "Segmenter":
        from ovseg_jax.inference.segmenter import Segmenter

        return Segmenter
    if name == "UserError":
        from ovseg_jax.errors import UserError

        return UserError
    raise AttributeError(f"module 'ovseg_jax' has no attribute '{name}'")
