"""Checks of config keys: each must be known, and keys set by a person must have an effect."""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax import methods
from ovseg_jax.config import keys, stages_of, unknown_key
from ovseg_jax.data.fields import batch_fields
from ovseg_jax.errors import UserError
from ovseg_jax.evals.registry import COMMON, evaluator_type
from ovseg_jax.experiment.stages import check_keys
from ovseg_jax.parallel.sharding import AXES
from ovseg_jax.towers.vocabulary import SPOKEN

TOP = keys("method row seed steps batch_size accumulate profile tensorboard wandb log_every sharding stages")
# The sections that `--mode=eval` reads from the given config; all others come from the run.
EVALUATED = ("data", "evals", "final_evals", "mesh", "sharding")

_LEAST = {
    "steps": 0,
    "batch_size": 1,
    "accumulate": 1,
    "log_every": 1,
    "data.image_size": 1,
    "data.workers": 0,
    "optimizer.learning_rate": 0,
}
"""The smallest values of numbers that every run has."""


def check_config(config: ConfigDict, given: Collection[str] = (), where: str = "") -> None:
    """Raises a UserError for a key that nothing reads, also in the stages of a config.

    Keys of networks, sources and augmentations are checked when those are created.

    Args:
      config: the config of a run.
      given: keys set by a person, such as "optimizer.momentum"; these must also have an effect together with the
        config's other values.
      where: the position of a stage's config, for errors.

    Raises:
      UserError: a key is unknown or has no effect, where the message names the known keys; or a number is out of range.
    """
    sections = known_keys(config)
    for key, value in config.items():
        if key not in sections and key not in TOP:
            raise UserError(unknown_key(f"{where}{key}", [*sections, *TOP]))
        if key not in sections:
            continue
        for name in _items(value):
            if name not in sections[key]:
                raise UserError(unknown_key(f"{where}{key}.{name}", sections[key]))
    for key, least in _LEAST.items():
        section, _, name = key.rpartition(".")
        value = (config.get(section, {}) if section else config).get(name)
        if isinstance(value, int | float) and not value >= least:  # also NaN
            raise UserError(f"{where}{key}={value} is less than {least}, or not a number")
    for evaluations in ("evals", "final_evals"):
        for name, evaluation in _items(config.get(evaluations)).items():
            known = evaluation_keys(evaluation)
            for key in evaluation:
                if key not in known:
                    raise UserError(unknown_key(f"{where}{evaluations}.{name}.{key}", known))
    for key in given:
        section, _, name = key.partition(".")
        if not sections.get(section, {}).get(name.partition(".")[0], True):
            effective = ", ".join(k for k, effect in sections[section].items() if effect)
            raise UserError(
                f"{key} has no effect in this config; keys of {section} that have an effect: {effective}"
            )
        if section == "final_evals" and name.endswith(".every"):
            raise UserError(f"{key} has no effect: final_evals only run at the end")
    for name, stage in stages_of(config).items():
        if stage.kind == "train":
            check_config(stage.config, where=f"{where}stages.{name}.")
        else:
            check_keys(stage, f"{where}stages.{name}")


def check_evaluation(given: Collection[str]) -> None:
    """Raises a UserError for a key that an evaluation takes from the run.

    Raises:
      UserError: there is such a key; the message names it.
    """
    for key in given:
        if key.split(".")[0] not in EVALUATED:
            raise UserError(
                f"{key} has no effect with --mode=eval, which only reads {', '.join(EVALUATED)} and keeps the run's "
                "other settings"
            )


def known_keys(config: ConfigDict) -> dict[str, Mapping[str, bool]]:
    """Returns the known keys of each section, and whether each has an effect with the config's other values."""
    optimizer, data = config.get("optimizer", {}), config.get("data", {})
    sgd, schedule = optimizer.get("name", "adamw") == "sgd", optimizer.get("schedule")
    method = methods.method_type(config.get("method"))
    fields = set(batch_fields(method, config))
    words, scene = bool(fields & {"words", "box_words"}), not fields & {"label", "tokens", "prompts"}
    parts = "prompts" in fields or ("tokens" in fields and data.get("caption_text", "caption") != "caption")
    return {
        "mesh": dict.fromkeys(AXES, True),
        "checkpoint": keys("every keep"),
        "evals": dict.fromkeys(_items(config.get("evals")), True),
        "final_evals": dict.fromkeys(_items(config.get("final_evals")), True),
        "optimizer": {
            **keys("name learning_rate schedule warmup_steps warmup_rate hold_steps weight_decay clip_norm"),
            **keys("multipliers no_decay ema"),
            **keys("final_fraction decay_steps", schedule not in ("constant", "steps")),
            **keys("power", schedule == "polynomial"),
            **keys("drops", schedule == "steps"),
            **keys("momentum nesterov", sgd),
            **keys("b1 b2", not sgd),
        },
        "data": {
            **keys("train image_size fields workers threads prefetch views"),
            **keys("words extra_words label_size max_segments batch_augment"),
            **keys("augment short_side", "scale_jitter" not in data and "flip" not in data),
            **keys("mask_stride", bool(fields & {"masks", "pixel_classes"})),
            **keys("max_masks max_boxes", any(field.startswith(("mask", "box")) for field in fields)),
            **keys("max_tags", bool(fields & {"tags", "box_tags"})),
            **keys("max_box_tags", "box_tags" in fields),
            **keys("box_draw", any(field.startswith("box") for field in fields)),
            **keys("max_box_tokens", "box_tokens" in fields),
            **keys("max_tag_tokens", bool(fields & {"tags", "box_tags"})),
            **keys("max_words keep_prob", words),
            **keys("caption_filter min_count", scene),
            **keys("tagger", scene or parts),
            **keys("caption_text", "tokens" in fields),
            **keys("max_prompts", "prompts" in fields),
            **keys("count_captions", scene or bool(fields & SPOKEN.keys())),
            **keys("scale_jitter flip", data.get("augment") is None and data.get("short_side") is None),
            **keys("cache_features", "label" in fields),
        },
        **method.keys(config),
    }


def evaluation_keys(evaluation: ConfigDict) -> dict[str, bool]:
    """Returns the known keys of an evaluation, which depend on its type."""
    evaluator = evaluator_type(evaluation.get("type", "segmentation"))
    return dict.fromkeys((*COMMON, *evaluator.overrides, *evaluator.options), True)


def _items(section: Any) -> Mapping[str, Any]:
    return dict(section.items()) if hasattr(section, "items") else {}
