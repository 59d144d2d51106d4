"""The config argument is typed by its defaults and refuses what it does not know; every config builds."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from ovseg_jax import config, methods
from ovseg_jax.data.geometry import geometry_of
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.decisions.published import protocol
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.keys import check_config
from ovseg_jax.methods import build
from ovseg_jax.pretrained import published
from ovseg_jax.towers.templates import read_templates
from ovseg_jax.train.optimizer import make_optimizer, make_schedule
from ovseg_jax.vocab.classes import LABEL_FILES, parse_labels, read_label_file
from ovseg_jax.vocab.words import WordList


def load(name: str, arg: str | None = None):
    return importlib.import_module(f"ovseg_jax.configs.{name}").get_config(arg)


def test_values_take_the_type_of_their_defaults():
    out = config.parse_arg("a=3,b=0.5,c=x=y,d", a=1, b=1.0, c="", d=False, e="kept")
    assert (out.a, out.b, out.c, out.d, out.e) == (3, 0.5, "x=y", True, "kept")


def test_a_path_may_hold_commas():
    out = config.parse_arg("dir=/a,b/c,n=2", dir="", n=1)
    assert (out.dir, out.n) == ("/a,b/c", 2)


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
        "data=prepared,data_dir=x;y,narratives=z,val_dir=v",
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
        ("pomp_segments", "data=prepared,data_dir=x,unseen=coco_stuff,val_dir=y"),
        ("zsseg", None),
        ("zsseg", "data=prepared,data_dir=x,unseen=voc,init=p.safetensors"),
        *(("pomp", f"data=folder,data_dir=x,method={m}") for m in ("pomp", "vpt")),
        ("pomp", "data=prepared,data_dir=x,classes=19"),
    ],
)
def test_pomp_builds_and_survives_json(name, arg):
    out = load(name, arg)
    assert config.to_json(config.from_json(config.to_json(out))) == config.to_json(out)


@pytest.mark.parametrize(
    ("unseen", "steps", "first", "split", "ensemble"),
    [
        ("coco_stuff", 16_000, (60_000, 32, 640), "train", 0.8),
        ("voc", 3200, (20_000, 16, 512), "trainaug", 0.7),
    ],
)
def test_the_numbers_of_zsseg(unseen, steps, first, split, ensemble):
    """zsseg.baseline/configs: the prompt, MaskFormer with it, and both together."""
    out = load("zsseg", f"data=prepared,data_dir=x,unseen={unseen},init=p.safetensors")
    prompt, proposals = (stage["config"] for stage in out.stages)
    assert out.steps == 0 and (prompt.steps, prompt.prompt.init) == (steps, "p.safetensors")
    assert (proposals.steps, proposals.batch_size, proposals.data.image_size) == first
    assert proposals.model.backbone.name == "resnet101" and proposals.loss.unseen == unseen
    assert proposals.text.prompt == out.prompt.init == "stage:prompt/prompt.safetensors"
    assert prompt.data.train[0]["of"]["split"] == proposals.data.train[0]["split"] == split
    (only,) = out.final_evals.values()
    assert (only.ensemble, only.split, only.source.split) == (ensemble, unseen, "val")
    more = load("zsseg", f"data=prepared,data_dir=x,unseen={unseen},trained=all,eval_sets=y,prompt=vild")
    assert more.stages[0]["config"].loss.unseen == "" and more.stages[0]["config"].text.prompt == "vild"
    others = {name: (e.get("threshold"), e.ensemble, e.get("split")) for name, e in more.final_evals.items()}
    assert others["ADE20K"] == (0.4, 0.5, None) and others["PC-59"] == (0.5, 0.4, None)


@pytest.mark.parametrize(("target", "steps"), [("voc", 20_000), ("context", 40_000), ("coco", 80_000)])
def test_the_numbers_of_p_seg_plus(target, steps):
    """papers/002, Table 11; every multiplier finds parameters of MAE's ViT-B."""
    from ovseg_jax.train.state import abstract_variables

    out = load(
        "upernet", f"data=prepared,data_dir=x,val_dir=y,teacher=r,background=background,target={target}"
    )
    assert (out.steps, out.batch_size, out.optimizer.warmup_steps) == (steps, 16, 1500)
    assert (out.optimizer.learning_rate, out.optimizer.weight_decay, out.optimizer.b2) == (1e-4, 0.05, 0.999)
    again = config.from_json(config.to_json(out))
    assert config.to_json(again) == config.to_json(out)
    assert again.stages[0]["config"]["source"] == dict(name="prepared", data_dir="x")
    assert again.data.train[0]["masks"] == "stage:labels"
    rule = dict(voc="pseg_voc", context="context", coco="coco_object")[
        target
    ]  # as the teacher is evaluated, C.2
    assert protocol(rule) and again.stages[0]["config"]["protocol"] == rule
    assert (
        again.stages[0]["config"]["background"] == "background"
        and "background" not in out.final_evals.validation
    )
    added = load("upernet", "data=prepared,data_dir=x,val_dir=y,teacher=r,background=void")
    assert added.stages[0]["config"]["background"] == "void"
    assert added.final_evals.validation.background == "void by name"
    own = load("upernet", "data=prepared,data_dir=x,teacher=r,decision=semantic").stages[0]["config"]
    assert own["decision"] == "semantic" and "protocol" not in own
    assert out.final_evals.validation.windows.to_dict() == dict(stride=341, short=512, longest=2048)
    assert (
        "windows"
        not in load("upernet", "data=prepared,data_dir=x,val_dir=y,windows=False").final_evals.validation
    )
    again.data.image_size = 32  # the position table is resized
    method = build(again, WordList([]), parse_labels("background; dog"))
    optimizer = make_optimizer(again.optimizer, abstract_variables(method, 0)["params"], steps, method.frozen)
    assert [round(float(optimizer.schedule(t)) * 1e4, 3) for t in (1499, 1500, steps)] == [1.0, 1.0, 0.0]
    tower = optimizer.trainable["image"]["backbone"]["tower"]
    assert not any(tower["Transformer"]["encoder_norm"].values()) and tower["cls"]


@pytest.mark.parametrize(
    ("name", "arg", "spared"),
    [
        ("pseg", "data=tars,data_dir=x,tokenizer=words", r"/bias$"),
        ("maskformer", "data=prepared,data_dir=x,backbone=swin_small", r"/(queries|relative_position_bias)$"),
        ("maskformer", "data=coco,data_dir=x", r"/queries$"),
        (
            "mask2former",
            "data=coco,data_dir=x,backbone=swin_tiny",
            r"/(query_features|query_positions|decoder/level_embedding|relative_position_bias)$",
        ),
    ],
)
def test_what_does_not_decay(name, arg, spared):
    out = load(name, arg)
    if name == "pseg":
        del out["pseudo_masks"]
    out.data.image_size = 32
    method = build(out, WordList(["dog"]), parse_labels("dog; sky"))
    params = jax.eval_shape(method.init, jax.random.key(0))["params"]
    make_optimizer(out.optimizer, params, out.steps, method.frozen)  # every pattern finds parameters
    axes = {f"/{path}": x.ndim for path, x in flatten_dict(params, sep="/").items()}
    found = lambda patterns: {p for p, n in axes.items() if n > 1 and any(re.search(x, p) for x in patterns)}
    assert found(out.optimizer.no_decay) == found([spared]) and found([spared])


def test_the_schedules_of_maskformer():
    for arg, peak in (("", 1e-4), (",backbone=swin_tiny", 6e-5)):
        out = load("maskformer", f"data=prepared,data_dir=x{arg}")
        rate, first = make_schedule(out.optimizer, out.steps), out.optimizer.warmup_steps
        rates = [float(rate(t)) for t in (first, (out.steps + first) / 2, out.steps)]
        np.testing.assert_allclose(rates, [peak, peak * 0.5**0.9, 0], rtol=1e-4)


def test_the_crops_of_maskformer_and_its_kin():
    """Sizes in pixels: MIN_SIZE_TRAIN, MAX_SIZE_TRAIN and CROP.SIZE of their authors' configs."""
    for name, arg, sizes in (
        ("maskformer", "", (256, 1024, 2048, 512)),
        ("mask2former", ",backbone=swin_large_384", (320, 1280, 2560, 640)),
        ("maskformer", ",classes=text,unseen=coco_stuff", (320, 960, 2560, 640)),
        ("maskformer", ",classes=text,unseen=voc", (320, 960, 2048, 512)),
    ):
        data = load(name, f"data=prepared,data_dir=x{arg}").data
        crop = geometry_of(data, True)
        assert (crop.ratio[0] * crop.size, crop.ratio[1] * crop.size, crop.long_side, crop.size) == sizes
        assert crop.colours and crop.flip and crop.category_share == 1


def test_the_schedules_of_mask2former():
    out = load("mask2former", "data=coco,data_dir=x")
    rate = make_schedule(out.optimizer, out.steps)
    rates = [float(rate(t)) for t in (0, 327_777, 327_778, 355_092, out.steps)]
    np.testing.assert_allclose(rates, [1e-4, 1e-4, 1e-5, 1e-6, 1e-6], rtol=1e-5)
    ade = load("mask2former", "data=prepared,data_dir=x,backbone=swin_large_384")
    assert (ade.steps, ade.data.image_size, ade.data.short_side.ratio) == (160_000, 640, (0.5, 2.0))
    assert float(make_schedule(ade.optimizer, ade.steps)(80_000)) == pytest.approx(1e-4 * 0.5**0.9)


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
        (
            "pomp",
            "sample=0",
            r"sample=0 has no effect with data=scenes: keys that have an effect are data, seed",
        ),
        ("pomp", "method=vpt", "method=vpt has no effect with data=scenes"),
        (
            "pomp",
            "data=folder,data_dir=x,method=maple,length=4",
            "length=4 has no effect with .*method=maple",
        ),
        ("pomp", "data=folder,data_dir=x,method=coop,sample=9", "sample=9 has no effect with .*method=coop"),
        ("pomp", "data=folder,data_dir=x,sample=0,proposal=frequency", "proposal=frequency has no effect"),
        ("pomp", "data=folder,data_dir=x,method=vpt,cache=2", "cache=2 has no effect with .*method=vpt"),
        (
            "pomp",
            "data=folder,data_dir=x,specific,group=base",
            "group=base has no effect with .*specific=True",
        ),
        ("pomp", "data=folder,method=linear_probe,group=base", "group=base has no effect"),
        ("pomp", "data=prepared,data_dir=x,names=y", "names=y has no effect with data=prepared"),
        ("pomp_segments", "towers=clip_rn50", "towers=clip_rn50 has no effect with data=scenes"),
        ("pomp_segments", "data=masks,data_dir=x,run=y", "run=y has no effect with data=masks"),
        ("pomp_segments", "data=masks,data_dir=x,proposals=y", "proposals=y has no effect with data=masks"),
        ("pomp_segments", "data=coco,data_dir=x,val_dir=y", "val_dir=y has no effect with data=coco"),
        ("openseg", "data_dir=x", "data_dir=x has no effect with data=scenes"),
        ("openseg", "size=tiny", "size=tiny has no effect with data=scenes"),
        ("openseg", "init=scratch", "init=scratch has no effect with data=scenes"),
        ("openseg", "data=coco,data_dir=x,val_dir=y,kind=semantic", "val_dir=y has no effect with data=coco"),
        ("openseg", "data=coco,data_dir=x,kind=semantic", "kind=semantic has no effect with data=coco"),
        ("openseg", "data=coco,data_dir=x,kind=segments", "kind=segments has no effect with data=coco"),
        ("openseg", "data=coco,data_dir=x,sets=A-150", "sets=A-150 has no effect"),
        ("openseg", "data=prepared,data_dir=x,kind=semantic", "kind=semantic has no effect"),
        (
            "openseg",
            "data=coco,data_dir=x,init=scratch,weights=y",
            "weights=y has no effect with .*init=scratch",
        ),
        ("openseg", "data=coco,data_dir=x,text=learned,text_weights=y", "text_weights=y has no effect"),
        (
            "openseg",
            "data=coco,data_dir=x,vectors=y.npz,text=bert",
            "text=bert has no effect with .*vectors=y.npz",
        ),
        ("openseg", "data=coco,data_dir=x,size=tiny,backbone=resnet50", "backbone=resnet50 has no effect"),
        ("openseg", "method=lseg,contrast=sync", "contrast=sync has no effect with method=lseg"),
        ("openseg", "method=lseg,evals=panoptic", "evals=panoptic has no effect with .*method=lseg"),
        ("openseg", "data=folder,data_dir=x,evals=panoptic", "evals=panoptic has no effect with data=folder"),
        ("openseg", "evals=benchmark", "evals=benchmark has no effect with data=scenes"),
        ("openseg", "data=coco,data_dir=x,evals=benchmark", "evals=benchmark needs eval_sets=DIR"),
        (
            "openseg",
            "data=coco,data_dir=x,evals=benchmark,eval_sets=s,sets=A-150",
            "sets=A-150 has no effect",
        ),
        ("openseg", "method=lseg,kp=0.5", "kp=0.5 has no effect with method=lseg"),
        ("openseg", "method=lseg,mask_weight=0", "mask_weight=0.0 has no effect with method=lseg"),
        ("openseg", "data=coco,data_dir=x,names=y", "names=y has no effect with data=coco"),
        *(
            (
                "openseg",
                f"data=coco,data_dir=x,stage=teacher,{key}",
                f"{key.split('=')[0]}=.* has no effect with",
            )
            for key in (
                "text=bert",
                "kp=0.5",
                "masks=none",
                "method=lseg",
                "captions=all",
                "evals=panoptic",
                "kind=semantic",
            )
        ),
    ],
)
def test_a_key_that_nothing_reads(name, arg, message):
    with pytest.raises(UserError, match=message):
        load(name, arg)


def test_a_key_that_something_reads():
    assert load("pomp", "data=folder,data_dir=x,method=coop,length=4").prompt.length == 4
    assert load("openseg", "data=folder,data_dir=x,kind=semantic").data.train[0]["kind"] == "semantic"


@pytest.mark.parametrize("arg", ["shots=0", "classes=1", "classes=many"])
def test_a_run_that_is_counted_in_epochs_has_examples(arg):
    with pytest.raises(UserError, match=arg.split("=")[0]):
        load("pomp", f"data=folder,data_dir=x,{arg}")


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
    with pytest.raises(UserError, match=r"train holds 2 class folders, but num_classes=10451 .*classes=2\)"):
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
    scratch = load("openseg", "data=coco,data_dir=x,narratives=y,init=scratch,text=learned")
    assert (scratch.optimizer.learning_rate, scratch.steps) == (0.32, 180_000)
    assert scratch.model.backbone.init == "" and scratch.text.learned and scratch.model.embed_dim == 640
    assert tuple(out.data.scale_jitter) == (0.8, 1.2)
    assert out.data.keep_prob == 0.75
    assert len(out.data.train) == 2


def test_coco_alone_is_trained_half_as_long():
    """4.1: 30,000 steps; Table 3's numbers are for COCO and Localized Narratives."""
    assert load("openseg", "data=coco,data_dir=x").steps == 30_000
    assert load("openseg", "data=coco,data_dir=x,init=scratch").steps == 90_000


def test_lseg_takes_more_steps_on_scenes_only():
    for data in ("coco", "folder"):
        arg = f"data={data},data_dir=x,backbone=resnet101"
        assert load("openseg", f"{arg},method=lseg").steps == load("openseg", arg).steps == 30_000
    assert load("openseg", "method=lseg").steps == load("openseg").steps * 8 // 5


def test_the_mask_head_of_the_paper_is_a_dot_product():
    out = load("openseg", "data=coco,data_dir=x,init=scratch")
    assert (out.model.mask_scale, out.model.mask_bias, out.model.detach_masks) == (1.0, None, False)


def test_rare_words_are_dropped_only_where_words_learn_vectors():
    for arg, least in (("text=clip", 1), ("vectors=y.npz", 1), ("text=learned", 5)):
        assert load("openseg", f"data=coco,data_dir=x,{arg}").data.min_count == least


@pytest.mark.parametrize(
    ("backbone", "mean", "std"),
    [
        ("efficientnet_b7", 0.485, 0.229),
        ("resnet101", 0.485, 0.229),
        ("dino_vits8", 0.485, 0.229),
        ("mae_vitb16", 0.485, 0.229),
        ("clip_vitb16", 0.48145466, 0.26862954),
    ],
)
def test_pixels_are_normalised_as_the_weights_know_them(backbone, mean, std):
    out = load("openseg", f"data=coco,data_dir=x,backbone={backbone}")
    assert (out.model.mean[0], out.model.std[0]) == (mean, std)
    noise = load("openseg", f"data=coco,data_dir=x,backbone={backbone},init=scratch")
    assert noise.model.mean[0] == noise.model.std[0] == 128 / 255


def test_towers_get_the_pixels_that_they_know():
    towers = load("pomp", "data=folder,data_dir=x").towers
    assert (towers.mean, towers.std) == tuple(published.CLIP)
    assert published.pixels_of("siglip_vitb16").mean[0] == 0.5


def test_an_installation_holds_the_configs_and_label_files(tmp_path):
    """As `ovseg_jax.configs`, where a checkout has a folder beside the package; and never as `configs`."""
    pytest.importorskip("setuptools")
    root = Path(config.__file__).parents[1]
    build = [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={tmp_path}"]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ovseg_jax"]
    labels = {path.name for path in (tmp_path / "ovseg_jax/vocab/labels").iterdir()}
    assert labels == {f"{name}.txt" for name in LABEL_FILES}
    code = "from ovseg_jax.configs import pomp_segments as c, tables; tables.all_tables(); "
    code += "print(c.__file__, c.get_config().steps)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "ovseg_jax/configs/pomp_segments.py"), "1000"]


def test_narratives_of_several_collections_are_one_part():
    """4.1: COCO and Localized Narratives, which are prepared by collection, are drawn with equal probability."""
    out = load(
        "openseg", "data=coco,data_dir=x,narratives=a;b;c,narratives_are=prepared,pseudo=true,text=learned"
    )
    coco, told = out.data.train
    assert coco["name"] == "coco" and told["name"] == "joined" and told["masks"] == "stage:masks"
    parts = [dict(name="prepared", data_dir=place) for place in "abc"]
    assert [dict(part) for part in told["sources"]] == parts and out.steps == 60_000
    teacher, labels = (stage["config"] for stage in out.stages)
    assert len(teacher.data.train) == 1 and labels["source"]["name"] == "joined"
    (_, one) = load("openseg", "data=coco,data_dir=x,narratives=a,narratives_are=prepared").data.train
    assert dict(one) == parts[0]
    folders = load("openseg", "data=prepared,data_dir=x,narratives=a,narratives_are=folders").data.train
    assert [part["name"] for part in folders] == ["prepared", "folder"]
    with pytest.raises(UserError, match="narratives_are=prepared has no effect"):
        load("openseg", "data=coco,data_dir=x,narratives_are=prepared")


def test_prepared_sets_are_mixed():
    parts = load("openseg", "data=prepared,data_dir=/x;/y,narratives=/z").data.train
    assert [(part["name"], part["data_dir"]) for part in parts] == [("prepared", f"/{k}") for k in "xyz"]
    assert not load("openseg", "data=prepared,data_dir=/x").evals


def test_the_sets_of_table_2():
    out = load("openseg", "data=coco,data_dir=x,eval_sets=/sets")
    assert list(out.evals) == ["validation"]
    assert set(out.final_evals) == {"validation", "A-847", "PC-459", "A-150", "PC-59", "PAS-20"}
    assert out.final_evals["PC-59"].source.data_dir == "/sets/PC-59"
    assert out.final_evals["PC-59"].source.kind == "semantic"
    ours = load("openseg", "data=coco,data_dir=x,eval_sets=/sets,sets_are=prepared").final_evals["A-847"]
    assert ours.source.to_dict() == {"name": "prepared", "data_dir": "/sets/A-847", "split": "val"}
    few = load("openseg", "data=folder,data_dir=x,eval_sets=gs://b/sets,sets=PC-59;mine")
    assert set(few.final_evals) == {"PC-59", "mine"}


def test_ablations_of_openseg_by_name():
    """Tables 4, 8 and 9, on `scenes` and by the paper's recipe; what is not said stays the recipe's."""
    for data in ("", "data=coco,data_dir=x,"):
        usual = load("openseg", data)
        out = load("openseg", f"{data}kp=0.25,mask_weight=0,masks=predicted;none;truth")
        assert (out.data.keep_prob, out.loss.mask_weight, out.loss.grounding_weight) == (0.25, 0, 1)
        for section in (out.evals, out.final_evals):
            assert all(e.masks == ("predicted", "none", "truth") for e in section.values())
        assert usual.loss.mask_weight > 0 and usual.data.keep_prob != 0.25
        assert all(e.masks == ("predicted",) for e in usual.final_evals.values())
        out = load("openseg", f"{data}kp=0.5,mask_weight=2")
        usual.update(dict(loss=dict(mask_weight=2.0)))
        with usual.ignore_type():
            usual.data.keep_prob = 0.5
        assert config.to_json(out) == config.to_json(usual)


def test_a_teacher_learns_masks_alone_and_is_tested_on_recall():
    """3.3; and Table 1 and 6, whose sets have segments or areas of classes."""
    for arg in (
        "",
        "data=coco,data_dir=x,size=tiny",
        "data=coco,data_dir=x,eval_sets=s,sets=PC-59,kind=semantic",
    ):
        out = load("openseg", f"{arg},stage=teacher,seed=3")
        assert (out.loss.grounding_weight, out.text.learned, out.seed) == (0, True, 3)
        assert methods.method_type(out.method).fields(out) == ("image", "masks")
        assert {e.type for e in (*out.evals.values(), *out.final_evals.values())} == {"proposals"}
        check_config(out)
    assert out.final_evals["PC-59"].source.kind == "semantic" and out.model.embed_dim == 640
    assert load("openseg", "stage=teacher").loss.mask_weight == load("openseg").loss.mask_weight


def test_folders_of_masks_are_mixed_with_equal_probability():
    """Table 6: MSeg."""
    out = load("openseg", "data=folder,data_dir=a;b/c;d,kind=semantic,stage=teacher")
    assert [part["data_dir"] for part in out.data.train] == ["a", "b/c", "d"]
    assert {part["kind"] for part in out.data.train} == {"semantic"}
    assert not any("weight" in part for part in out.data.train)


def test_sets_are_tested_with_more_names_as_well():
    out = load("openseg", "data=coco,data_dir=x,eval_sets=s,sets=A-150;PC-59,names=n")
    assert set(out.final_evals) == {"validation", "A-150", "A-150+eng", "PC-59", "PC-59+eng"}
    assert out.final_evals["A-150+eng"].source.to_dict() == dict(
        name="folder", kind="semantic", data_dir="s/A-150", labels="n/A-150.txt"
    )
    assert "labels" not in out.final_evals["A-150"].source


def test_the_benchmark_is_the_five_sets_alone():
    """4.1; PAS-20's background is what PC-59 has and VOC lacks."""
    out = load("openseg", "data=coco,data_dir=x,evals=benchmark,eval_sets=s,names=n")
    five = ["A-847", "PC-459", "A-150", "PC-59", "PAS-20"]
    assert set(out.final_evals) == {*five, *(f"{name}+eng" for name in five)}
    assert list(out.evals) == ["validation"]
    check_config(out)
    for name in ("PAS-20", "PAS-20+eng"):
        rest = out.final_evals[name].names.background
        assert len(rest) == 39 and {"tree", "sky"} < set(rest) and not {"table", "cat"} & set(rest)
    assert not any("names" in out.final_evals[name] for name in five[:4])
    prepared = load("openseg", "data=prepared,data_dir=x,evals=benchmark,eval_sets=s,sets_are=prepared")
    assert prepared.final_evals["PC-59"].source.to_dict() == dict(
        name="prepared", split="val", data_dir="s/PC-59"
    )
    assert set(prepared.final_evals) == set(five)
    alone = load("openseg", "data=coco,data_dir=x,evals=benchmark,eval_sets=s,method=lseg")
    assert set(alone.final_evals) == set(five)


def test_the_package_has_more_names_for_three_sets():
    out = load("openseg", "data=coco,data_dir=x,eval_sets=s,sets=A-847;A-150;PAS-20,names=package")
    assert set(out.final_evals) == {"validation", "A-847", "A-150", "PAS-20", "A-150+eng", "PAS-20+eng"}
    assert out.final_evals["PAS-20+eng"].source.labels == "voc_2012"
    with pytest.raises(UserError, match="names=package: the package has more names for A-150, PC-59, PAS-20"):
        load("openseg", "data=coco,data_dir=x,eval_sets=s,sets=A-847,names=package")
    out = load("openseg", "data=coco,data_dir=x,eval_sets=s,evals=benchmark,names=package")
    assert out.final_evals["PAS-20+eng"].source.labels == "voc_2012_background"


def test_the_labels_with_background_are_those_without():
    alone, both = (read_label_file(name) for name in ("voc_2012", "voc_2012_background"))
    assert both.names == (("background",), *alone.names) and both.ids == (0, *alone.ids)
    assert both.isthing == (False, *alone.isthing)


def test_tars_are_mixed_in():
    train = load("openseg", "data=coco,data_dir=x,tars=/cc3m;/sbu").data.train
    assert [dict(part) for part in train[1:]] == [
        dict(name="webdataset", data_dir=f"/{k}") for k in ("cc3m", "sbu")
    ]
    with pytest.raises(UserError, match="tars=/cc3m has no effect with data=scenes"):
        load("openseg", "tars=/cc3m")


def test_negatives_of_the_papers_recipe_differ_between_devices():
    assert load("pomp", "data=folder,data_dir=x").loss.per_device
    assert not load("pomp", "data=folder,data_dir=x,per_device=False").loss.per_device
    assert not load("pomp").loss.per_device


def test_both_prompt_ensembles_are_scored():
    """Table 1 of papers/000 is that of seven templates in its authors' code."""
    prompts = load("pomp", "data=folder,data_dir=x").final_evals.validation.prompts
    assert {name: len(read_templates(value)) for name, value in prompts.items()} == {
        "hard": 1,
        "ensemble": 7,
        "ensemble_80": 80,
    }


def test_the_fifty_epochs_of_table_3():
    """The cosine is as long as the run."""
    out, usual = (load("pomp", f"data=folder,data_dir=x{epochs}") for epochs in (",epochs=50", ""))
    assert out.steps == out.optimizer.decay_steps == 50 * out.optimizer.hold_steps
    assert usual.steps == usual.optimizer.decay_steps == 20 * out.optimizer.hold_steps
    rate = make_schedule(out.optimizer, out.steps)
    assert rate(usual.steps) > 0.6 * out.optimizer.learning_rate
    assert load("pomp", "data=folder,data_dir=x,length=4,epochs=50").steps == out.steps


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
    assert "init" not in tiny.model.backbone and tiny.text.learned


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


@pytest.mark.parametrize(
    ("arg", "human", "captioned", "steps"),
    [
        ("images=50,captioned=70", ("scenes", 50), ("scenes", 70), 5500),
        ("data=coco,data_dir=x,narratives=y,text=learned", ("coco", None), ("folder", None), 30_000),
    ],
)
def test_a_teacher_labels_what_has_captions_alone(arg, human, captioned, steps):
    """3.3, and rows of Table 8."""
    out = load("openseg", f"{arg},pseudo=true,seed=3")
    named = lambda sources: [(source["name"], source.get("num_examples")) for source in sources]
    assert named(out.data.train) == [human, captioned]
    first, last = out.data.train
    assert "masks" not in first and last["masks"] == "stage:masks"
    teacher, labels = (stage["config"] for stage in out.stages)
    assert named(teacher.data.train) == [human] and teacher.seed == 3
    assert (teacher.steps, teacher.loss.grounding_weight) == (steps, 0)
    assert labels["teacher"] == "stage:teacher"
    assert labels["source"] == {k: v for k, v in last.items() if k not in ("masks", "cache")}
    (masks,) = load("openseg", f"{arg},pseudo=runs/teacher").stages
    assert masks["config"] == labels | {"teacher": "runs/teacher"}
    alone = load("openseg", f"{arg},seed=3")
    assert "masks" not in alone.data.train[-1] and not alone.get("stages")


def test_each_source_of_captions_gets_its_masks():
    out = load("openseg", "data=coco,data_dir=x,narratives=y,tars=a;b,pseudo=runs/teacher")
    places = {stage["name"]: stage["config"]["source"]["data_dir"] for stage in out.stages}
    assert places == {"masks": "y", "masks1": "a", "masks2": "b"}
    assert [source.get("masks") for source in out.data.train] == [None, *(f"stage:{name}" for name in places)]


def test_captions_alone_train_the_masks_too():
    """Table 8, row 2: with nothing but the grounding loss."""
    assert load("openseg").model.detach_masks
    assert not load("openseg", "mask_weight=0").model.detach_masks


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("pseudo=true", "pseudo=true labels the images of captioned=, which is missing"),
        (
            "data=coco,data_dir=x,pseudo=true",
            "pseudo=true labels the images of narratives=, which is missing",
        ),
        ("stage=teacher,captioned=5,pseudo=true", "pseudo=true has no effect"),
        ("method=lseg,captioned=5,pseudo=true", "pseudo=true has no effect"),
        ("images=0", "images"),
        ("data=folder,data_dir=x,images=5", "images=5 has no effect"),
    ],
)
def test_pseudo_masks_need_captions(arg, message):
    with pytest.raises(UserError, match=message):
        load("openseg", arg)


def test_a_frozen_text_side_is_not_trained():
    out = load("openseg", "data=coco,data_dir=x,vectors=y.npz")
    assert (out.text.learned, out.text.vectors) == (False, "y.npz")
    words, classes = WordList(["red"]), parse_labels("red")
    assert build(out, words, classes).frozen == ("^text/",)
    assert build(load("openseg", "data=coco,data_dir=x,size=tiny"), words, classes).frozen == ()


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("pomp", "data=imagenet"),
        ("pomp", "data=folder,group=odd"),
        ("pomp", "data=folder,towers=vit"),
        ("pomp", "data=folder,method=lseg"),
        ("pomp_segments", "data=folder"),
    ],
)
def test_a_wrong_choice_of_pomp_is_a_sentence(name, arg):
    with pytest.raises(UserError):
        load(name, arg)
