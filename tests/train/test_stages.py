"""A run that begins with other runs: the embedded POMP, made tiny, from CLIP to segmentation."""

import json
from pathlib import Path
from runpy import run_path

import jax
import numpy as np
import pytest
from etils import epath

from ovseg_jax.config import needed, resolved
from ovseg_jax.errors import UserError
from ovseg_jax.segmenter import Segmenter
from ovseg_jax.train.run import evaluate, train

ROOT = Path(__file__).parents[2]


def tiny():
    """configs/pomp.py in the smallest of its worlds, with steps that learn nothing."""
    config = run_path(str(ROOT / "configs" / "pomp.py"))["get_config"]("seed=3")
    text = json.dumps(config.to_dict()).replace('"size": "large"', '"size": "tiny"')
    config = type(config)(json.loads(text))
    del config.before["coop"]
    for stage in (config, *config.before.values()):
        stage.update(steps=2, batch_size=16)
        stage.log_every = 1
        for source in stage.data.train:
            source.update({"shots": 2} if "shots" in source else {"num_examples": 8})
        if stage.method == "pomp":
            stage.loss.sample = 4
    config.before.proposals.model.update(width=16, num_queries=2, decoder_layers=1)
    config.before.proposals.model.backbone.width = 16
    for stage in (config, config.before.clip, config.before.uncorrected):
        stage.towers.image.width = 16
    prompts = dict(hard="a photo of a {}", uncorrected="before:uncorrected/prompt.safetensors")
    for evaluation in config.final_evals.values():
        evaluation.prompts = prompts
        evaluation.batch_size = 8
    config.final_evals.segmentation.source.update(size="tiny", num_examples=4)
    config.final_evals.segmentation.source.image_size = 64
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("stages"))
    return tiny(), workdir, train(tiny(), workdir)


def test_the_summary_compares_prompts(run):
    _, workdir, summary = run
    for metric in ("test/accuracy", "test/accuracy@held_out", "segmentation/hiou"):
        assert {metric, f"{metric}[hard]", f"{metric}[uncorrected]"} <= summary.keys()
    assert {path.name for path in workdir.iterdir() if path.is_dir()} >= {"clip", "uncorrected", "proposals"}
    assert len((workdir / "prompt.safetensors").read_bytes()) < 10_000


def test_features_are_those_of_the_clip_that_came_first(run):
    from ovseg_jax.data.pipeline import make_source, view_batches
    from ovseg_jax.train.checkpoints import load_variables
    from ovseg_jax.train.run import load_parts
    from ovseg_jax.train.sharding import make_mesh

    config, workdir, _ = run
    config, variables, _ = load_variables(workdir / "clip")
    parts = load_parts(config, workdir / "clip", make_mesh())
    own = resolved(tiny(), workdir)
    source = make_source(own.data.train)
    batch = next(view_batches(own, parts.words, source, own.data.cache_features))
    expected = parts.method.embed_image(variables, jax.numpy.asarray(batch["image"]))
    kept = np.load(workdir / "features" / "features.npy")
    assert kept.shape == (len(source), 2, 64)
    np.testing.assert_allclose(kept.reshape(-1, 64)[:16], expected, atol=1e-5)


def test_a_second_start_does_nothing_again(run, capsys):
    _, workdir, summary = run
    assert train(tiny(), workdir) == summary
    assert "first:" not in capsys.readouterr().out


def test_evaluation_by_itself(run):
    config, workdir, summary = run
    again = evaluate(config, workdir)
    assert again["test/accuracy"] == pytest.approx(summary["test/accuracy"])
    assert again["segmentation/miou[hard]"] == pytest.approx(summary["segmentation/miou[hard]"])


def test_a_classifier_does_not_segment(run):
    _, workdir, _ = run
    with pytest.raises(UserError, match=r"method=pomp does not segment.*ovseg_jax\.transfer"):
        Segmenter.from_checkpoint(workdir)


def test_stages_that_wait_for_each_other(tmp_path):
    config = tiny()
    config.before.clip.towers.init = "before:uncorrected"
    config.before.proposals = config.before.clip
    with pytest.raises(UserError, match="waits for another"):
        train(config, tmp_path)


def test_towers_of_another_shape(run, tmp_path):
    _, workdir, _ = run
    config = resolved(tiny(), workdir)
    del config["before"]
    config.towers.image.width = 32
    with pytest.raises(
        UserError, match=r"clip has other towers.*kernel is \(3, 3, 16, 24\) there, \(3, 3, 32, 48\)"
    ):
        train(config, tmp_path)


def test_what_a_config_speaks_of():
    config = tiny()
    assert needed(config.before.uncorrected) == {"clip"} and needed(config.before.clip) == set()
    there = resolved(config, "/runs/a")
    assert there.towers.init == "/runs/a/clip"
    assert there.final_evals.test.prompts.uncorrected == "/runs/a/uncorrected/prompt.safetensors"
