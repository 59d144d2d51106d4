"""The optimiser that a config describes: clipping, update rule, weight decay, rate multipliers, frozen parameters."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.parallel.sharding import tree_paths

RULES = ("adam", "adamw", "lamb", "lion", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "polynomial", "steps")
# For these rules weight decay is the classic L2 term, added to the gradient before the rule; for others it is
# decoupled.
COUPLED = ("adam", "sgd")


class Optimizer(NamedTuple):
    """An optax transformation, its schedule, and which parameters it trains.

    Attributes:
      transform: init and update over the whole parameter tree; frozen parameters get no state and no update.
      schedule: step -> learning rate, for the log.
      trainable: a tree like the parameters, True for trained ones.
      ema: the decay of the parameters' moving average; 0 for none.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    trainable: Any
    ema: float = 0.0


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Creates the learning rate schedule for the steps in [0, steps).

    It is a linear warm-up over `warmup_steps`, (t + 1) / warmup_steps, so that the rate of the first step is not 0;
    then, with p the share of the remaining steps that is done and f = `final_fraction`, constant: 1; linear: 1 - (1 -
    f) p; polynomial: f + (1 - f) (1 - p)^`power`; cosine: f + (1 - f) (1 + cos(pi p)) / 2; steps: 1, divided by 10 at
    each of the steps `drops`; all times `learning_rate`. `warmup_rate` is a constant rate in place of the linear
    warm-up; `decay_steps` is the number of steps in which p goes from 0 to 1; `hold_steps` is the number of steps for
    which a rate is kept, such as an epoch.

    Raises:
      UserError: the schedule is unknown, or "steps" has no drops.
    """
    name = config.get("schedule", "cosine")
    if name not in SCHEDULES:
        raise UserError(f'optimizer.schedule="{name}" is unknown; the schedules are {", ".join(SCHEDULES)}.')
    peak, warmup = float(config["learning_rate"]), int(config.get("warmup_steps", 0))
    final = float(config.get("final_fraction", 0.0))
    hold, decay_steps = int(config.get("hold_steps", 1)), int(config.get("decay_steps", steps - warmup))
    first_rate, drops = config.get("warmup_rate"), tuple(config.get("drops", ()))
    if name == "steps" and not drops:
        raise UserError('optimizer.schedule="steps" needs optimizer.drops, the steps at which the rate falls')
    power = float(config.get("power", 1.0)) if name == "polynomial" else 1.0

    def schedule(step: Any) -> jax.Array:
        step = hold * (jnp.asarray(step, jnp.float32) // hold)
        done = jnp.clip((step - warmup) / max(decay_steps, 1), 0.0, 1.0)
        if name == "constant":
            decay = jnp.ones_like(done)
        elif name == "steps":
            decay = jnp.prod(jnp.where(step >= jnp.array(drops), 0.1, 1.0))
        elif name in ("linear", "polynomial"):
            decay = final + (1.0 - final) * (1.0 - done) ** power
        else:
            decay = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        rising = (step + 1.0) / max(warmup, 1) if first_rate is None else float(first_rate) / peak
        return peak * jnp.where(step < warmup, rising, decay)

    return schedule


def freezer(config: ConfigDict, more: Sequence[str] = ()) -> Callable[[str], bool]:
    """Returns a function that tells whether a variable is frozen, by its path.

    Paths of parameters are written without "params/", those of other variables with their collection.

    Args:
      config: `config.optimizer`, whose `multipliers` freeze by (regex, None).
      more: further regexes, from the method.
    """
    rules = [(pattern, None) for pattern in more] + list(config.get("multipliers", ()))
    return lambda path: next((f is None for pattern, f in rules if re.search(pattern, path)), False)


def make_optimizer(config: ConfigDict, params: Any, steps: int, more: Sequence[str] = ()) -> Optimizer:
    """Creates the optimiser that `config` describes for these parameters.

    Args:
      config: `config.optimizer`. `name` (adamw, adam, sgd, lamb, lion), `learning_rate`, `schedule`,
        `warmup_steps`, `final_fraction`, `warmup_rate`, `decay_steps`, `hold_steps`, `power`, `drops` (see
        `make_schedule`), `weight_decay` (on arrays of two or more dimensions, so never on scales and temperatures, but
        on biases of attention, which have an axis of heads; not on parameters whose path matches one of the regexes
        `no_decay`), `clip_norm` (0 = off), `b1`, `b2`, `momentum` (sgd), `nesterov`, `multipliers` ((regex, factor)
        pairs: the first regex that matches in a parameter's path scales its rate, or freezes it if the factor is
        None), `ema` (the decay of the parameters' moving average, min(ema, (1 + t) / (10 + t)) at step t, which is
        then used for evaluation and export; 0 = none). lamb scales an update to its parameter's norm only where the
        parameter decays, as apex's FusedLAMB does.
      params: the parameter tree; arrays or their shapes.
      steps: length of the run, for the schedule.
      more: regexes of parameters that the method freezes.

    Raises:
      UserError: the name is unknown, a regex matches no parameter, or `ema` is outside [0, 1).
    """
    name = config.get("name", "adamw")
    if name not in RULES:
        raise UserError(f'optimizer.name="{name}" is unknown; the optimisers are {", ".join(RULES)}.')
    paths = tree_paths(params)
    names = jax.tree.leaves(paths)
    multipliers = tuple((pattern, factor) for pattern, factor in config.get("multipliers", ()))
    _check_found("multipliers", [pattern for pattern, _ in multipliers], names)
    no_decay = tuple(config.get("no_decay", ()))
    _check_found("no_decay", no_decay, names)

    ema = float(config.get("ema", 0.0))
    if not 0 <= ema < 1:
        raise UserError(f"optimizer.ema={ema} is not in [0, 1)")

    b1, b2 = float(config.get("b1", 0.9)), float(config.get("b2", 0.99 if name == "lion" else 0.999))
    rule = {
        "adam": lambda: optax.scale_by_adam(b1, b2),
        "adamw": lambda: optax.scale_by_adam(b1, b2),
        "lamb": lambda: optax.scale_by_adam(b1, b2, eps=1e-6),
        "lion": lambda: optax.scale_by_lion(b1, b2),
        "sgd": lambda: optax.trace(float(config.get("momentum", 0.9)), bool(config.get("nesterov", False))),
    }[name]()
    schedule = make_schedule(config, steps)
    links = []
    if clip := float(config.get("clip_norm", 0.0)):
        links.append(optax.clip_by_global_norm(clip))
    decay = []
    if weight_decay := float(config.get("weight_decay", 0.0)):
        decay.append(optax.add_decayed_weights(weight_decay, mask=_decaying(no_decay)))
    links += [*decay, rule] if name in COUPLED else [rule, *decay]
    if name == "lamb":
        links.append(optax.masked(optax.scale_by_trust_ratio(), _decaying(no_decay)))
    if any(factor is not None for _, factor in multipliers):
        links.append(_scale_by_path(multipliers))
    links.append(optax.scale_by_learning_rate(schedule))
    transform = optax.chain(*links)

    frozen = freezer(config, more)
    trainable = jax.tree.map(lambda path: not frozen(path), paths)
    if not all(jax.tree.leaves(trainable)):
        # The partition is outermost, so that frozen parameters have no state and no influence on clipping.
        labels = jax.tree.map(lambda moves: "trained" if moves else "frozen", trainable)
        transform = optax.partition({"trained": transform, "frozen": optax.set_to_zero()}, labels)
    return Optimizer(transform, schedule, trainable, ema)


def _check_found(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(
                f'optimizer.{key} has "{pattern}", which matches no parameter name, such as "{names[0]}".'
            )


def _decaying(no_decay: Sequence[str]) -> Callable[[Any], Any]:
    """Returns a function from parameters to a tree of whether each decays."""
    matches = lambda path: any(re.search(pattern, path) for pattern in no_decay)
    return lambda params: jax.tree.map(
        lambda p, path: p.ndim > 1 and not matches(path), params, tree_paths(params)
    )


def _scale_by_path(multipliers: Sequence[tuple[str, float | None]]) -> optax.GradientTransformation:
    def factor(path: str) -> float:
        return next((float(f or 0) for pattern, f in multipliers if re.search(pattern, path)), 1.0)

    def scale(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda u, path: u * factor(path), updates, tree_paths(updates))

    return optax.stateless(scale)
