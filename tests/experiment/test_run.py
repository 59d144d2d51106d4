"""What a run leaves beside its checkpoints, and takes from other runs."""

import json

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.experiment.run import train
from ovseg_jax.towers.prompt_file import load_prompt
from ovseg_jax.train.checkpoints import load_variables
from tests.methods.test_prompt_tuning import config as prompt_config


def test_a_run_of_pomp_leaves_its_prompt_for_others(tmp_path):
    """The first stage's prompt starts the second, and is evaluated beside the second's own."""
    source = {"name": "image_folder", "data_dir": str(tmp_path / "images")}
    for k, name in enumerate(("red ball", "blue kite", "old moon")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            image = np.random.default_rng([k, i]).integers(60 * k, 60 * k + 120, (20, 20, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / "images" / name / f"{i}.png")
    config = prompt_config(**{"batch_size": 8, "loss.sample": 0, "towers.text.layers": 1})
    config.update(
        ConfigDict(
            dict(
                seed=0,
                steps=2,
                profile="",
                mesh=dict(data=-1, fsdp=1),
                optimizer=dict(
                    name="sgd", learning_rate=0.1, schedule="constant", momentum=0.9, weight_decay=0.0
                ),
                data=dict(train=[source], image_size=16, workers=0),
                evals={},
                final_evals={},
                checkpoint=dict(every=0, keep=1),
                log_every=2,
            )
        )
    )
    first = ConfigDict(config.to_dict())
    config.stages = [{"name": "first", "kind": "train", "config": first}]
    config.steps = 0
    config.prompt.init = "stage:first/prompt.safetensors"
    prompts = {"first": "stage:first/prompt.safetensors"}
    config.final_evals = {
        "test": {"type": "classification", "source": source, "batch_size": 8, "prompts": prompts}
    }
    train(config, tmp_path / "run")
    left, started = (
        load_prompt(tmp_path / "run" / name) for name in ("first/prompt.safetensors", "prompt.safetensors")
    )
    variables, step = load_variables(tmp_path / "run" / "first")
    assert step == 2
    np.testing.assert_array_equal(left.context, variables["params"]["prompt"]["context"])
    np.testing.assert_array_equal(started.context, left.context)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # The towers are random and the same, since no init names others: one prompt, one score.
    assert summary["test/alignment[first]"] == summary["test/alignment"]
