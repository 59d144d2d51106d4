"""Every key of every shipped config has a reader, and what is set without effect is refused."""

import ast
from pathlib import Path
from runpy import run_path

import pytest

import ovseg_jax
from ovseg_jax.configs import (
    clip_dense,
    fcclip,
    groupvit,
    mask2former,
    maskformer,
    openseg,
    pomp,
    pomp_segments,
    pseg,
    umg_clip,
    upernet,
    zsseg,
)
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.keys import check_config, check_evaluation, known_keys
from ovseg_jax.experiment.run import train

PACKAGE = Path(ovseg_jax.__file__).parent
FOLDER = "data=folder,data_dir=x"
FOLDERS = dict(name="folder", data_dir="x")
SHIPPED = [
    *(
        (openseg, arg)
        for arg in (None, "method=lseg", "data=coco,data_dir=x,eval_sets=y", f"{FOLDER},val_dir=y")
    ),
    *(
        (openseg, f"data=coco,data_dir=x,{arg}")
        for arg in ("size=tiny", "vectors=y", "text=learned,method=lseg")
    ),
    *(
        (pomp, arg)
        for arg in (None, *(f"{FOLDER},method={method}" for method in pomp.METHODS), f"{FOLDER},sample=0")
    ),
    (maskformer, None),
    *((mask2former, arg) for arg in (None, "data=coco,data_dir=x", f"{FOLDER},val_dir=y,backbone=swin_tiny")),
    *((fcclip, arg) for arg in (None, "data=coco,data_dir=x", "data=coco,data_dir=x,published=y")),
    *((groupvit, arg) for arg in (None, "data=sets,eval_sets=x")),
    *(
        (pseg, arg)
        for arg in (
            None,
            "form=paper",
            "plus=true",
            "ahead=false",
            "data=tars,data_dir=x;y,val_dir=z,ahead=true",
        )
    ),
    *(
        (pomp_segments, arg)
        for arg in (None, "run=r", "data=masks,data_dir=x", "data=coco,data_dir=x,proposals=y")
    ),
    *((openseg, arg) for arg in ("stage=teacher", "captioned=9,pseudo=true", "mask_weight=0")),
    *(
        (clip_dense, arg)
        for arg in (None, "features=activation", "features=proposals", "data=sets,eval_sets=x")
    ),
    *(
        (umg_clip, arg)
        for arg in (None, "adapt=none,losses=image_captions", "adapt=global", "adapters=False")
    ),
    *(
        (umg_clip, f"data={arg},data_dir=x")
        for arg in ("umg41m,retrieval=y,loop=true", "umg41m,adapt=global", "coco,eval_sets=y,things=z")
    ),
    *(
        (upernet, arg)
        for arg in (
            None,
            "teacher=r,decision=groupvit",
            f"{FOLDER},val_dir=y,teacher=r,background=b,target=coco",
        )
    ),
    *((zsseg, arg) for arg in (None, "data=prepared,data_dir=x,trained=all,eval_sets=y,prompt=vild")),
]


def test_all_shipped_configs_are_here():
    files = {path.stem for path in Path(openseg.__file__).parent.glob("*.py")} - {"__init__", "common"}
    assert files == {module.__name__.rpartition(".")[2] for module, _ in SHIPPED}


@pytest.mark.parametrize(("module", "arg"), SHIPPED)
def test_a_key_that_nothing_reads_is_refused_in_every_section(module, arg):
    config = module.get_config(arg)
    check_config(config)
    for section in [
        name for name in known_keys(config) if name in config and name not in ("evals", "final_evals")
    ]:
        wrong = module.get_config(arg)
        wrong[section]["colour_of_the_sky"] = 1
        with pytest.raises(
            UserError, match=rf"unknown config key \'{section}.colour_of_the_sky\'.*known keys: \w+"
        ):
            check_config(wrong)
    for key in ("stepss", "augment"):
        wrong = module.get_config(arg)
        wrong[key] = 1
        with pytest.raises(UserError, match=f"unknown config key '{key}'"):
            check_config(wrong)
    for evaluations in ("evals", "final_evals"):
        for name in config[evaluations]:
            wrong = module.get_config(arg)
            wrong[evaluations][name].classes = "cat"
            with pytest.raises(UserError, match=rf"unknown config key \'(final_)?evals.{name}.classes\'"):
                check_config(wrong)


def test_stages_are_checked_before_the_first_runs():
    config = pomp.get_config()
    config.stages[1]["config"].optimizer.learning_rat = 0.1
    with pytest.raises(
        UserError, match=r"\'stages.coop.optimizer.learning_rat\' .did you mean \'learning_rate\'"
    ):
        check_config(config)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            dict(teacher="stage:teacher", source=FOLDERS, treshold=0.6),
            r"'stages.masks.treshold' .did you mean 'threshold'.*batch_size, .*, source, teacher",
        ),
        (dict(source=FOLDERS), r"stages.masks of kind 'pseudo_label' needs teacher="),
    ],
)
def test_stages_of_other_kinds_are_checked_before_the_first_runs(labels, message, tmp_path):
    """Where a wrong key was found when the stage began, after hours of the teacher before it."""
    config = openseg.get_config()
    teacher = dict(name="teacher", kind="train", config=openseg.get_config())
    masks = dict(name="masks", kind="pseudo_label", config=labels)
    config.stages = [teacher, masks]
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    outer = openseg.get_config()
    outer.stages = [dict(name="all", kind="train", config=config)]
    with pytest.raises(UserError, match=r"stages\.all\.stages\.masks"):
        check_config(outer)
    config.stages[1]["config"] = dict(teacher="stage:teacher", source=FOLDERS, threshold=0.6)
    check_config(config)


@pytest.mark.parametrize(
    ("module", "arg", "key"),
    [
        (openseg, None, "optimizer.momentum"),
        (openseg, "data=coco,data_dir=x", "optimizer.b1"),
        (openseg, None, "loss.form"),
        (openseg, "contrast=sync", "loss.group"),
        (openseg, "method=lseg", "loss.mask_weight"),
        (openseg, "method=lseg", "model.num_queries"),
        (openseg, "data=coco,data_dir=x", "text.learned"),
        (openseg, "vectors=x", "text.tower"),
        (openseg, None, "final_evals.test.every"),
        (openseg, None, "data.augment"),
        *((openseg, "stage=teacher", f"loss.{key}") for key in ("contrast", "group", "temperature")),
        *((pseg, None, f"loss.{key}") for key in ("focal", "dice", "form")),
        *((pseg, "baseline=True", key) for key in ("loss.matching", "loss.focal")),
        (pomp, None, "loss.chunk"),
        (pomp, f"{FOLDER},method=coop", "loss.correction"),
        (pomp, f"{FOLDER},method=cocoop", "prompt.specific"),
        (pomp, f"{FOLDER},method=maple", "prompt.position"),
        (pomp, None, "data.keep_prob.noun"),
    ],
)
def test_a_key_without_effect_is_refused_where_a_person_sets_it(module, arg, key):
    config = module.get_config(arg)
    check_config(config)
    with pytest.raises(UserError, match=f"{key} has no effect"):
        check_config(config, ["seed", key])


def test_keys_with_an_effect_can_be_set():
    check_config(
        openseg.get_config("contrast=sync"), ["loss.form", "steps", "optimizer.b2", "data.keep_prob.noun"]
    )
    check_config(
        openseg.get_config("data=coco,data_dir=x"), ["optimizer.momentum", "text.prompt", "optimizer.ema"]
    )
    check_config(openseg.get_config(), ["model.backbone.width", "evals.validation.every", "mesh.fsdp"])
    check_config(pseg.get_config("form=paper"), ["loss.focal", "loss.dice", "loss.form", "loss.matching"])
    check_config(pseg.get_config("baseline=True"), ["pseudo_masks.clusters", "loss.group"])


def test_an_evaluation_reads_no_more_than_it_says():
    check_evaluation(["final_evals.test.limit", "mesh.data", "data.threads"])
    with pytest.raises(UserError, match=r"model.width has no effect with --mode=eval"):
        check_evaluation(["mesh.data", "model.width"])


@pytest.mark.parametrize("method", ["opensegg", None])
def test_an_unknown_method(method):
    config = openseg.get_config()
    config.method = method
    with pytest.raises(UserError, match=r"the method .* is not one of openseg, lseg"):
        check_config(config)


def test_each_known_key_has_a_reader():
    """Somewhere in the package stands `.key`, "key" or a field of that name: no list keeps what code has lost."""
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                read.add(node.target.id)
            elif isinstance(node, ast.arg):
                read.add(node.arg)
    for module, arg in SHIPPED:
        sections = known_keys(module.get_config(arg))
        names = {name for key, section in sections.items() if "evals" not in key for name in section}
        assert not names - read


def test_the_tests_own_config_is_a_config():
    check_config(run_path(str(Path(__file__).parents[1] / "tiny.py"))["get_config"]())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", -1),
        ("batch_size", 0),
        ("data.image_size", -8),
        ("data.workers", -1),
        ("optimizer.learning_rate", float("nan")),
    ],
)
def test_numbers_out_of_range(key, value):
    from tests.tiny import get_config

    config = get_config()
    check_config(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"^{key}={value} is less than"):
        check_config(config)
