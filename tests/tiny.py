"""The shipped OpenSeg config, shrunk to seconds; `bad_data=true` and the like come through `get_config`."""

from ovseg_jax.config import parse_arg
from ovseg_jax.configs import openseg


def get_config(arg=None):
    args = parse_arg(arg, steps=6, seed=0)
    config = openseg.get_config()
    config.update(dict(steps=args.steps, seed=args.seed, batch_size=4, log_every=2))
    config.model.update(dict(width=16, embed_dim=16, num_queries=4, decoder_layers=1, position_grid=4))
    config.model.backbone.width = 16
    config.loss.group = 4
    config.data.image_size = 32
    config.checkpoint.update(dict(every=3, keep=2))
    config.data.train = [dict(name="scenes", split="train", num_examples=200, image_size=32)]
    for split, evaluations in (("validation", config.evals), ("test", config.final_evals)):
        for name in evaluations:
            evaluations[name].update(dict(batch_size=4, every=4))
            evaluations[name].source = dict(name="scenes", split=split, num_examples=6, image_size=32)
    return config
