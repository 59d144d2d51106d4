"""P-Seg's configs run from captions alone: pseudo-masks, training, labels for P-Seg+, and its student."""

import json
import shutil

import jax
import numpy as np
import pytest

from ovseg_jax.configs import pseg
from ovseg_jax.data.scenes.source import Scenes
from ovseg_jax.data.source_base import Example
from ovseg_jax.experiment.run import train
from ovseg_jax.inference.export import export_model
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.pretrained.files import read_arrays
from tests.extras import require
from tests.methods.test_groupvit_method import pieces


class Maskless(Scenes):
    """Scenes whose masks cannot be read."""

    def __getitem__(self, index):
        def refuse(_):
            raise AssertionError("a mask was read")

        own = super().__getitem__(index)
        hidden = dict.fromkeys(("segments", "class_ids", "isthing", "iscrowd", "boxes"), refuse)
        return Example(image=own["image"], captions=own["captions"], image_id=own["image_id"], **hidden)


def shrunk(arg):
    config = pseg.get_config(arg)
    runs = [config] if config.method == "pseg" else [config.stages[0]["config"], config]
    for run in runs:
        run.update(dict(steps=2, batch_size=8, log_every=1))
        run.model.backbone.width = 16
        if run.model.get("network") == "maskformer":
            run.model.layers = 1
            run.text.layers = 1
        if run.method == "pseg":
            run.model.update(dict(width=32, embed_dim=16))
            run.evals = {}
            if "group" in run.loss:
                run.loss.group = 8
        (source,) = run.data.train
        given = [
            source,
            *(stage["config"]["source"] for stage in run.get("stages", []) if stage["kind"] != "train"),
        ]
        for one in given:
            one.update(dict(name="experiment.test_pseg_run:Maskless", num_examples=160, image_size=64))
            one.pop("cache", None)
        run.final_evals.test.source.num_examples = 4
    return config


def test_a_run_and_its_student_read_no_mask(tmp_path):
    train(shrunk("plus=true"), str(tmp_path / "run"))
    for place in ("run/pseg", "run"):
        assert np.isfinite(json.loads((tmp_path / place / "summary.json").read_text())["test/miou"])
    assert list((tmp_path / "run/pseg/masks").glob("masks-*.zip"))
    assert list((tmp_path / "run/labels").glob("masks-*.zip"))


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """A config of the paper's form with a tokeniser in a folder, its run, and the folder, which is gone."""
    for name in ("torch", "transformers", "flatbuffers"):
        require(name)
    folder = tmp_path_factory.mktemp("paper")
    (folder / "clip").mkdir()
    pieces(folder / "clip")
    config = shrunk("form=paper,ahead=false,prompts=2")
    config.text.tokenizer = str(folder / "clip")
    train(config, str(folder / "run"))
    shutil.rmtree(folder / "clip")
    return config, folder / "run"


def test_the_papers_form_segments_by_any_known_word_and_is_exported(paper, tmp_path):
    import ovseg_jax.torch

    segmenter = Segmenter.from_checkpoint(paper[1])
    image = Scenes(split="test")[0]["image"]
    result = segmenter.segment(image, "red ball; grass", threshold=-1.0)
    assert set(np.unique(result.label_map)) <= {0, 1}
    export_model(lambda: segmenter, "big_vision", str(tmp_path / "big_vision"))
    flat = np.load(tmp_path / "big_vision/model.npz")
    assert {"params/image/net/queries", "params/text/tower/Embed_0/embedding"} <= set(flat)
    export_model(lambda: segmenter, "stablehlo", str(tmp_path / "stablehlo"))
    exported = jax.export.deserialize(bytearray((tmp_path / "stablehlo/model.stablehlo").read_bytes()))
    pixels, size = np.stack([image, image[::-1]]), np.array([[64, 64], [40, 64]], np.int32)
    names = np.asarray(segmenter.embed(["red ball", "grass", "water"])["text"])
    weights = read_arrays(tmp_path / "stablehlo/model.safetensors")
    logits, scores, features = exported.call(weights, pixels, size, names)
    expected = jax.jit(segmenter.method.predict)(segmenter.variables, pixels, size)
    np.testing.assert_allclose(logits, expected.mask_logits, rtol=1e-3, atol=1e-3)
    regions = np.float64(expected.regions["text"])
    np.testing.assert_allclose(scores, np.einsum("td,bnd->btn", names, regions), atol=1e-4)
    np.testing.assert_allclose(features, expected.pixels["text"], rtol=1e-3, atol=1e-3)
    export_model(lambda: segmenter, "torch", str(tmp_path / "out"))
    found = ovseg_jax.torch.load(tmp_path / "out").segment(image, "red ball; grass", threshold=-1.0)
    assert (found.label_map == result.label_map).mean() > 0.999


def test_a_run_keeps_the_tokeniser_that_its_config_names(paper):
    config, run = paper
    names, image = ["red ball", "Grass!"], Scenes(split="test")[0]["image"]
    segmenter = Segmenter.from_checkpoint(run)
    vectors = np.asarray(segmenter.embed(names)["text"])
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4
    assert segmenter.segment(image, names, threshold=-1.0).label_map.shape == image.shape[:2]
    assert train(config, run)["steps"] == 2  # the same command, without the folder
