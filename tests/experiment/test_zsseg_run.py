"""Both stages of ZSSeg made tiny, from the prompt over MaskFormer to the scores of the papers' tables."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from ovseg_jax.config import stages_of
from ovseg_jax.configs import zsseg
from ovseg_jax.configs.tables import build
from ovseg_jax.configs.tables.pomp import TABLES
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.load import load_run
from ovseg_jax.experiment.run import train
from ovseg_jax.models import text_towers
from ovseg_jax.protocols import only
from ovseg_jax.towers.prompt_file import load_prompt
from tests.extras import require

IMAGE = dict(patch=16, width=32, depth=1, heads=2, mlp_dim=64, grid=(2, 2), embed_dim=24)
IMAGE |= dict(name="vit", pre_norm=True, activation="quick_gelu", epsilon=1e-5, head_bias=False)
TEXT = dict(width=32, layers=1, heads=2, embed_dim=24)
SCENES = dict(name="scenes", image_size=64, size="tiny")


def with_stages(config, own):
    config.stages = [dict(name=name, kind="train", config=stage) for name, stage in own.items()]
    return config


def small_net(config):
    """Makes a MaskFormer tiny."""
    config.model.update(num_queries=3, width=32, mask_dim=32, layers=1, heads=2, ffn=32)
    config.model.update(dtype="float32", remat="none", embed_hidden=16)
    config.model.backbone = dict(name="small", width=16, levels=3)
    config.optimizer.update(schedule="cosine", multipliers=(), warmup_steps=0)


def short(config):
    config.update(steps=min(config.steps, 2), batch_size=8, log_every=1)
    config.data.workers = 0


def test_the_stages_on_scenes(tmp_path):
    config = zsseg.get_config("seed=3")
    own = {name: stage.config for name, stage in stages_of(config).items()}
    assert list(own) == ["clip", "pomp", "maskformer"]
    for stage in (config, *own.values()):
        short(stage)
        for source in stage.data.train:
            inner = source.get("of", source)
            inner.update(size="tiny", **({} if "shots" in inner else {"num_examples": 8}))
    for stage in (config, own["clip"], own["pomp"]):
        stage.towers.image.width = 16
    own["pomp"].loss.sample = 4
    small_net(own["maskformer"])
    for evaluation in config.final_evals.values():
        source = evaluation.source.get("of", evaluation.source)
        source.update(size="tiny", num_examples=4)
        evaluation.batch_size = 4
    summary = train(with_stages(config, own), epath.Path(tmp_path))
    assert {"segmentation/hiou", "segmentation/miou[hard]", "segmentation/miou[pomp]"} <= summary.keys()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP with random weights as transformers saves it, with CLIP's vocabulary."""
    torch, transformers, open_clip = require("torch"), require("transformers"), require("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    side = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(side, patch_size=16, image_size=32)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=vision, text_config=dict(side, intermediate_size=128), projection_dim=24
        )
    )
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    shutil.copy(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", folder)
    return str(folder)


def row_of(number, name, clip):
    """The config of a row with scenes in place of its data, and with the tiny CLIP."""
    table = next(table for table in TABLES if table.number == number)
    row = next(row for row in table.rows if row.name == name)
    config = build(table, row)
    own = {stage: found.config for stage, found in stages_of(config).items()}
    for stage in (config, *own.values()):
        short(stage)
        if "towers" in stage:
            stage.towers.update(image=IMAGE, text=dict(name="tiny_clip"), init=clip, image_size=32)
            stage.data.train[0]["of"] = dict(SCENES, split="train", num_examples=8)
            stage.data.train[0].update(unseen="", group="", shots=2)
            stage.data.update(image_size=32, cache_features=0)
        else:
            small_net(stage)
            stage.model.embed_dim = 24
            stage.text.update(tower="tiny_clip", init=clip)
            stage.loss.unseen = ""
            stage.data.update(train=[dict(SCENES, split="train", num_examples=8)], image_size=64, max_masks=6)
    evaluation = config.final_evals["COCO-Stuff"]
    evaluation.update(batch_size=4, split="")
    evaluation.source = dict(SCENES, split="test", num_examples=4)
    config.final_evals = {"COCO-Stuff": evaluation}  # the others only differ in numbers, and compile again
    return row, with_stages(config, own)


def test_a_row_runs_to_its_scores(tmp_path, monkeypatch, clip):
    """And the first stage embeds names in the very prompt of the second."""
    monkeypatch.setitem(text_towers.PRESETS, "tiny_clip", (text_towers.CLIPText, TEXT))
    row, config = row_of(5, "ZSSeg", clip)
    summary = train(config, epath.Path(tmp_path))
    assert {key for key in row.keys if key.startswith("COCO-Stuff/")} <= summary.keys()
    first = load_run(epath.Path(tmp_path) / "maskformer")
    second = load_run(epath.Path(tmp_path))
    names = ["red ball", "grass"]
    found = only(first.method.embed_text(first.variables, names))
    own = load_prompt(tmp_path / "prompt" / "prompt.safetensors").context
    np.testing.assert_array_equal(load_prompt(tmp_path / "prompt.safetensors").context, own)
    np.testing.assert_allclose(found, only(second.method.embed_text(second.variables, names)), atol=1e-5)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("data=prepared", "data=prepared needs data_dir=DIR"),
        (
            "data=prepared,data_dir=x,prompt=hard",
            "prompt=hard is not learned, single, imagenet, vild, or the file",
        ),
        ("data=prepared,data_dir=x,prompt=vild,init=y", "init=y has no effect"),
        ("trained=all", "trained=all has no effect"),
    ],
)
def test_a_wrong_argument_is_a_sentence(arg, message):
    with pytest.raises(UserError, match=message):
        zsseg.get_config(arg)
