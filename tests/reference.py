"""For the tests of the backbones: variables without compiling an initialiser, randomised PyTorch models, and
what becomes of their weights here."""

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.pretrained.rename import fit, rename


def images(*shape, seed=0):
    """Normalised images [*shape 3]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, 3)), jnp.float32)


def count(tree):
    """The number of parameters."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def init(model, *inputs, seed=0):
    """Variables like those of `model.init`, drawn by NumPy: compiling initialisers takes long."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return rng.normal(0, (2 / fan_in) ** 0.5, leaf.shape).astype(leaf.dtype)
        return np.full(leaf.shape, 1 if name in ("scale", "var") else 0, leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return jax.tree.map_with_path(draw, shapes)


def randomise(model, seed=0):
    """Fills a PyTorch model so that each parameter and statistic matters and activations keep their scale."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(module, torch.nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, fan_in**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def load(model, original, renames, *inputs):
    """The variables of our `model` for `inputs`, from a PyTorch model's by its names: none lacks, none is left over."""
    state = {name: value.detach().numpy() for name, value in original.state_dict().items()}
    return fit(rename(state, renames), jax.eval_shape(model.init, jax.random.key(0), *inputs))


def torch_images(x):
    """[b h w 3] as PyTorch's [b 3 h w]."""
    import torch

    return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2))


def assert_maps_agree(ours, expected, what):
    """Each of our maps {name: [b h w c]} against PyTorch's [b c h w], to 1e-4 of its largest value."""
    assert len(ours) == len(expected)
    for (name, x), y in zip(ours.items(), expected, strict=True):
        error = relative_error(x, y.numpy().transpose(0, 2, 3, 1))
        print(f"{what} {name} {x.shape} max relative error {error:.1e}")
        assert error < 1e-4


def relative_error(ours, reference):
    """Largest deviation over the largest value of the reference."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def assert_trees_agree(ours, expected):
    """To 1e-5 of the largest entry of all: behind a norm, many gradients are zero but for cancelled rounding."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert largest > 1e-3
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest)
