"""The models in PyTorch, without JAX. A module's attributes carry the names of its Flax twin's parameters."""
