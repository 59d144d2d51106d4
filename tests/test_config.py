"""The config argument is typed by its defaults and refuses what it does not know; every config builds."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from ovseg_jax import config
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.errors import UserError
from ovseg_jax.methods import build
from ovseg_jax.vocab.classes import parse_labels
from ovseg_jax.vocab.words import WordList

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name: str, arg: str | None = None):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def test_values_take_the_type_of_their_defaults():
    out = config.parse_arg("a=3,b=0.5,c=x=y,d", a=1, b=1.0, c="", d=False, e="kept")
    assert out.to_dict() == {"a": 3, "b": 0.5, "c": "x=y", "d": True, "e": "kept"}


def test_a_path_may_hold_commas():
    assert config.parse_arg("dir=/a,b/c,n=2", dir="", n=1).to_dict() == {"dir": "/a,b/c", "n": 2}


@pytest.mark.parametrize("arg", [None, ""])
def test_no_argument_is_the_defaults(arg):
    assert config.parse_arg(arg, a=1).a == 1


def test_an_unknown_key_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown config key 'bach' .*'batch'.*known keys: batch, steps"):
        config.parse_arg("bach=3", batch=1, steps=2)


@pytest.mark.parametrize(("arg", "kind"), [("a=x", "int"), ("b=maybe", "bool")])
def test_a_value_of_the_wrong_type_is_named(arg, kind):
    with pytest.raises(UserError, match=f"takes a {kind}"):
        config.parse_arg(arg, a=1, b=False)


@pytest.mark.parametrize(
    "arg",
    [
        None,
        "method=lseg",
        "data=coco,data_dir=x",
        "data=coco,data_dir=x,size=tiny,contrast=sync",
        "data=folder,data_dir=x",
        "data=coco,data_dir=x,vectors=y.npz",
    ],
)
def test_configs_build_and_survive_json(arg):
    out = load("openseg", arg)
    again = config.from_json(config.to_json(out))
    assert config.to_json(again) == config.to_json(out)


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("pomp", None),
        ("pomp_segments", None),
        ("pomp_segments", "data=coco,data_dir=x,unseen=cow; giraffe,proposals=y"),
        *(("pomp", f"data=folder,data_dir=x,method={m}") for m in ("pomp", "vpt")),
    ],
)
def test_pomp_builds_and_survives_json(name, arg):
    out = load(name, arg)
    assert config.to_json(config.from_json(config.to_json(out))) == config.to_json(out)


def test_the_numbers_of_pomp():
    out = load("pomp", "data=folder,data_dir=x")
    assert (out.batch_size, out.data.views, out.data.train[0]["shots"]) == (32 * 8 * 4, 4, 16)
    assert (out.prompt.length, out.loss.sample, out.loss.correction) == (16, 1000, "log10")
    assert (out.optimizer.name, out.optimizer.learning_rate, out.optimizer.warmup_rate) == ("sgd", 2e-3, 1e-5)
    assert out.steps == 20 * out.optimizer.hold_steps == 20 * (10_451 * 16 // 256)
    assert load("pomp", "data=folder,data_dir=x,length=4").steps == out.steps // 4
    coop = load("pomp", "data=folder,data_dir=x,method=coop")
    assert (coop.method, coop.loss.sample, coop.batch_size, coop.data.augment.randaugment) == (
        "pomp",
        0,
        32,
        0,
    )


@pytest.mark.parametrize(
    ("name", "arg", "message"),
    [
        ("pomp", "sample=0", "sample=0 means nothing with data=scenes: known are data, method, seed"),
        ("pomp", "data=folder,data_dir=x,method=maple,length=4", "length=4 means nothing with method=maple"),
        ("pomp", "data=folder,data_dir=x,shots=0", "shots=0: at least 2 and 1"),
        ("pomp_segments", "towers=clip_rn50", "towers=clip_rn50 means nothing with data=scenes"),
        ("pomp_segments", "data=masks,data_dir=x,run=y", "run=y means nothing with data=masks"),
    ],
)
def test_a_key_that_nothing_reads(name, arg, message):
    with pytest.raises(UserError, match=message):
        load(name, arg)
    assert load("pomp", "data=folder,data_dir=x,method=coop,length=4").prompt.length == 4


def test_a_prompt_goes_on_learning_from_segments():
    """ZSSeg's numbers, and which classes are withheld from what."""
    masks = "data=masks,data_dir=x,val_dir=y,proposals=z"
    out = load("pomp_segments", f"{masks},unseen=coco_stuff,init=model.pth.tar-20")
    (source,) = out.data.train
    assert (out.steps, out.batch_size, source["shots"], source["group"]) == (16_000, 32, 32, "seen")
    assert (out.optimizer.learning_rate, out.optimizer.warmup_steps, out.loss.sample) == (0.02, 100, 0)
    assert out.optimizer.warmup_rate == pytest.approx(1e-4) and out.optimizer.clip_norm == 0.01
    assert source["fill"] == pytest.approx((122.771, 116.746, 104.094), abs=1e-3)
    assert (source["of"]["data_dir"], out.final_evals.validation.source.of.data_dir) == ("x", "y")
    assert out.final_evals.segmentation.split == source["unseen"] == "coco_stuff"
    assert {"single", "vild", "imagenet", "before"} == set(out.final_evals.segmentation.prompts)
    voc = load("pomp_segments", f"{masks},unseen=voc")
    assert (voc.steps, voc.data.train[0]["shots"], voc.final_evals.segmentation.ensemble) == (3_200, 128, 0.7)
    assert voc.prompt.init == "" and "before" not in voc.final_evals.segmentation.prompts
    assert not load("pomp_segments", "data=masks,data_dir=x").final_evals
    whole, of_run = load("pomp_segments"), load("pomp_segments", "run=runs/a,init=noise")
    assert [stage["name"] for stage in whole.stages] == [
        "clip",
        "pomp",
        "proposals",
    ] and "stages" not in of_run
    assert (whole.towers.init, whole.prompt.init) == ("stage:clip", "stage:pomp/prompt.safetensors")
    assert (of_run.towers.init, of_run.prompt.init) == ("runs/a/clip", "")


def test_the_number_of_classes_is_that_of_the_data(tmp_path):
    """Or a folder of two classes would be trained as long as ImageNet-21K."""
    for name in ("train/ant", "train/owl", "val/ant"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    folder = f"data=folder,data_dir={tmp_path}"
    with pytest.raises(UserError, match=r"train holds 2 class folders, and num_classes=10451 .*classes=2\)"):
        make_source(load("pomp", folder).data.train)
    out = load("pomp", f"{folder},classes=2")
    assert len(make_source(out.data.train)) == 2 and out.steps == 20
    assert len(make_source(out.final_evals.validation.source)) == 1


def test_base_classes_alone():
    out = load("pomp", "data=folder,data_dir=x,group=base,classes=101,shots=16,method=coop")
    assert out.data.train[0]["group"] == "base" and out.final_evals.validation.source.group == "base+new"
    assert out.optimizer.hold_steps == 51 * 16 // 32


def test_the_papers_numbers():
    out = load("openseg", "data=coco,data_dir=x,narratives=y")
    assert (out.model.width, out.model.num_queries, out.model.decoder_layers) == (640, 128, 3)
    assert (out.batch_size, out.loss.group, out.data.image_size) == (1024, 16, 640)
    assert (out.optimizer.learning_rate, out.steps, out.optimizer.weight_decay) == (0.08, 60_000, 1e-5)
    assert out.model.backbone.init == "timm:tf_efficientnet_b7.ns_jft_in1k"
    assert (out.text.tower, out.model.embed_dim) == ("clip_vitl14_336", 768)
    scratch = load("openseg", "data=coco,data_dir=x,init=scratch,text=learned")
    assert (scratch.optimizer.learning_rate, scratch.steps) == (0.32, 180_000)
    assert scratch.model.backbone.init == "" and scratch.text.learned and scratch.model.embed_dim == 640
    assert tuple(out.data.scale_jitter) == (0.8, 1.2)
    assert out.data.keep_prob == 0.75
    assert len(out.data.train) == 2


def test_weights_may_lie_in_a_folder():
    out = load(
        "openseg", "data=coco,data_dir=x,weights=/w/b7,text=bert,text_weights=/w/bert,backbone=resnet101"
    )
    assert (out.model.backbone.init, out.text.init, out.text.tower) == ("/w/b7", "/w/bert", "bert_large")
    assert (
        load("openseg", "data=coco,data_dir=x,backbone=resnet101").model.backbone.init
        == "timm:resnet101.tv_in1k"
    )
    tiny = load("openseg", "data=coco,data_dir=x,size=tiny")
    assert "init" not in tiny.model.backbone and tiny.text.learned and "frozen" not in tiny.optimizer


@pytest.mark.parametrize(
    "arg",
    [
        "data=imagenet",
        "size=huge",
        "data=coco,init=magic",
        "data=coco,init=align",
        "data=coco,text=sound",
        "data=coco,backbone=efficientnet_b0",
        "sizee=tiny",
    ],
)
def test_a_wrong_choice_is_a_sentence(arg):
    with pytest.raises(UserError):
        load("openseg", arg)


def test_a_frozen_text_side_is_not_trained():
    out = load("openseg", "data=coco,data_dir=x,vectors=y.npz")
    assert (out.text.learned, out.text.vectors, tuple(out.optimizer.frozen)) == (False, "y.npz", ("^text/",))
    words, classes = WordList(["red"]), parse_labels("red")
    build(out, words, classes)
    out.optimizer.frozen = ()
    with pytest.raises(UserError, match=r"optimizer\.frozen"):
        build(out, words, classes)


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("pomp", "data=imagenet"),
        ("pomp", "data=folder,group=odd"),
        ("pomp", "data=folder,group=base,method=linear_probe"),
        ("pomp", "data=folder,towers=vit"),
        ("pomp", "data=folder,method=lseg"),
        ("pomp", "method=vpt"),
        ("pomp_segments", "data=folder"),
        ("pomp_segments", "data=coco,data_dir=x,unseen=voc"),
        ("pomp_segments", "data=masks,data_dir=x,proposals=y"),
    ],
)
def test_a_wrong_choice_of_pomp_is_a_sentence(name, arg):
    with pytest.raises(UserError):
        load(name, arg)
