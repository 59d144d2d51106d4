"""A run that begins with other runs: the embedded POMP, made tiny, from CLIP to segmentation."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from ovseg_jax import predict
from ovseg_jax.config import resolved, stages_of, to_json
from ovseg_jax.configs import pomp, pomp_segments
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.transforms import class_map
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.run import evaluate, train
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.protocols import only
from ovseg_jax.towers.prompt_file import load_prompt
from tests.test_notebook import execute


def tiny():
    """configs/pomp.py in the smallest of its worlds, with steps that learn nothing."""
    config = pomp.get_config("seed=3")
    text = to_json(config).replace('"size": "large"', '"size": "tiny"')
    config = type(config)(json.loads(text))
    config.stages = [stage for stage in config.stages if stage["name"] != "coop"]
    own = {name: stage.config for name, stage in stages_of(config).items()}
    for stage in (config, *own.values()):
        stage.update(steps=2, batch_size=16)
        stage.log_every = 1
        for source in stage.data.train:
            source.update({"shots": 2} if "shots" in source else {"num_examples": 8})
        if stage.method == "pomp":
            stage.loss.sample = 4
    own["proposals"].model.update(width=16, num_queries=2, decoder_layers=1)
    own["proposals"].model.backbone.width = 16
    for stage in (config, own["clip"], own["uncorrected"]):
        stage.towers.image.width = 16
    config.stages = [dict(name=name, kind="train", config=stage) for name, stage in own.items()]
    prompts = dict(hard="a photo of a {}", uncorrected="stage:uncorrected/prompt.safetensors")
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
    from ovseg_jax.data.pipeline import view_batches
    from ovseg_jax.data.rows import Rows
    from ovseg_jax.experiment.load import load_run

    _, workdir, _ = run
    clip = load_run(workdir / "clip")
    own = resolved(tiny(), workdir)
    source = make_source(own.data.train)
    batch = next(view_batches(own, Rows.from_config(own, ("image",)), source, own.data.cache_features))
    expected = clip.method.embed_image(clip.variables, jax.numpy.asarray(batch["image"]))
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


def test_a_classifier_segments_with_the_masks_of_another_run(run, tmp_path, capsys):
    """In Python and on the command line, by the rules of the evaluation: the same pixels as it counted."""
    config, workdir, summary = run
    with pytest.raises(UserError, match=r"method=pomp, which does not segment.*--proposals"):
        Segmenter.from_checkpoint(workdir)
    evaluation = config.final_evals.segmentation
    source = make_source(evaluation.source)
    segmenter = Segmenter.from_two_stages(workdir / "proposals", workdir, ensemble=0.0, fill="zero")
    right = total = 0
    for index in range(len(source)):
        example = source[index]
        found = segmenter.segment(example["image"], source.classes, threshold=-1.0).label_map
        right += (found == class_map(example["segments"], example["class_ids"])).sum()
        total += found.size
    assert 100 * right / total == pytest.approx(summary["segmentation/pacc"], abs=0.01)
    other = Segmenter.from_two_stages(
        workdir / "proposals", workdir, templates="a photo of a {}", ensemble=0.0
    )
    embed = lambda s: np.asarray(only(s.embed("red ball")))
    assert not np.allclose(embed(segmenter), embed(other))

    Image.fromarray(source[0]["image"]).save(tmp_path / "a.png")
    flags = [f"--checkpoint={workdir}", f"--images={tmp_path}", f"--out={tmp_path / 'out'}"]
    stages = [f"--proposals={workdir / 'proposals'}", "--ensemble=0", "--fill=zero"]
    assert predict.main([*flags, *stages, "--labels=red ball; grass"]) == 0
    segments = json.loads((tmp_path / "out/a.json").read_text())["segments"]
    assert {segment["category"] for segment in segments} <= {"red ball", "grass"} and segments
    for wrong, message in (
        ([flags[0], *flags[1:], "--fill=zero"], "--fill needs --proposals"),
        ([*flags, *stages, "--step=2"], "--step cannot be used with --proposals"),
        ([*flags, *stages, "--features"], "leave out --proposals"),
        ([*flags, f"--proposals={workdir}"], "--proposals=.* does not propose masks"),
        (
            [f"--checkpoint={workdir / 'proposals'}", *flags[1:], stages[0]],
            "--checkpoint=.* does not classify images",
        ),
    ):
        capsys.readouterr()
        assert predict.main(wrong) == 1
        assert re.search(message, capsys.readouterr().err)


def test_its_prompt_is_tuned_on_segments(run, tmp_path):
    """The command of papers/000's tables 4 and 5, on what the run has left."""
    _, workdir, summary = run
    segments = pomp_segments.get_config(f"seed=3,run={workdir}")
    text = json.dumps(segments.to_dict()).replace('"size": "small"', '"size": "tiny"')
    config = type(segments)(json.loads(text))
    config.update(steps=2, batch_size=16)
    config.towers.image.width = 16
    config.data.train[0].update(shots=2)
    config.data.train[0]["of"].update(num_examples=12)
    for evaluation in config.final_evals.values():
        evaluation.batch_size = 8
    config.final_evals.validation.source["of"].num_examples = 12
    config.final_evals.segmentation.source.num_examples = 4
    tuned = train(config, tmp_path)
    # What it started from is the prompt of the run, which has met these scenes before.
    assert tuned["segmentation/miou[pomp]"] == pytest.approx(summary["segmentation/miou"])
    before, after = (
        load_prompt(str(folder / "prompt.safetensors")).context for folder in (workdir, tmp_path)
    )
    assert 0 < np.abs(after - before).max() < 0.1


def test_the_notebook(run, monkeypatch):
    config, workdir, _ = run
    monkeypatch.setattr(pomp, "get_config", lambda: config)
    assert len(execute("pomp.ipynb", Path(workdir), {})) == 5


def test_towers_of_another_shape(run, tmp_path):
    _, workdir, _ = run
    config = resolved(tiny(), workdir)
    del config["stages"]
    config.towers.image.width = 32
    with pytest.raises(
        UserError,
        match=r"clip has other towers.*kernel has the shape \(3, 3, 16, 24\) there, \(3, 3, 32, 48\)",
    ):
        train(config, tmp_path)
