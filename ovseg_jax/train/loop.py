"""The training loop, shared by all methods.

After each step its order is: eval -> save -> next batch -> step -> log. A checkpoint therefore holds exactly the state
that the evaluation before it used, and a resumed run repeats nothing.
"""

import contextlib
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.parallel.sharding import DEFAULT_RULES, check_batch_size, put_batch
from ovseg_jax.protocols import Evaluator, Trainable
from ovseg_jax.train import metrics as metrics_lib
from ovseg_jax.train.checkpoints import Checkpoints
from ovseg_jax.train.metrics import MetricWriter
from ovseg_jax.train.optimizer import freezer, make_optimizer
from ovseg_jax.train.profile import Profile
from ovseg_jax.train.progress import Progress
from ovseg_jax.train.state import (
    TrainState,
    abstract_state,
    abstract_variables,
    create_state,
    state_shardings,
)
from ovseg_jax.train.step import Metrics, make_step
from ovseg_jax.train.stop import StopRequest

Batches = Callable[[int], Iterator[Mapping[str, Any]]]


class Fit(NamedTuple):
    """The result of a training loop.

    Attributes:
      state: the last state.
      started: the step from which it started.
      step: the step at which it ended.
      stopped: whether it was stopped by a signal before the end; the state is saved.
      records: all records of `metrics.jsonl`.
      seconds: wall time, including earlier starts of this run.
      images_per_second: the rate of training, without compilation, evaluation and saving; 0 without a step.
      data_wait_seconds: the part of the training time spent waiting for batches.
    """

    state: TrainState
    started: int
    step: int
    stopped: bool
    records: list[dict[str, Any]]
    seconds: float
    images_per_second: float
    data_wait_seconds: float


def fit(
    config: ConfigDict,
    workdir: epath.PathLike,
    method: Trainable,
    batches: Batches,
    evaluators: Sequence[Evaluator],
    mesh: Mesh,
) -> Fit:
    """Trains from the last checkpoint in `workdir`, or from scratch, to `config.steps`.

    Args:
      config: with seed, steps, batch_size, accumulate, optimizer, checkpoint.every, checkpoint.keep, log_every,
        sharding, tensorboard, wandb (a project) and profile ("FIRST:STOP", the steps to trace into `workdir/profile`).
      workdir: the folder for `checkpoints/` and `metrics.jsonl`.
      method: see `protocols`.
      batches: step -> an iterator of this process's share of each batch from that step on.
      evaluators: run at multiples of their `every`.
      mesh: all devices of all processes.

    Raises:
      UserError: the loss is not finite, the disk is full, or the checkpoint belongs to another config.
    """
    steps, batch_size = int(config.steps), int(config.batch_size)
    check_batch_size(batch_size, mesh, parts=int(config.get("accumulate", 1)))
    first_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        variables = abstract_variables(method, config.seed)
        frozen = tuple(method.frozen)
        optimizer = make_optimizer(config.optimizer, variables["params"], steps, frozen)
        shardings = state_shardings(optimizer, variables, mesh, config.get("sharding", DEFAULT_RULES))
        train_step = make_step(method, optimizer, config.seed, shardings)

        every, keep = config.checkpoint.get("every", 0), config.checkpoint.get("keep", 1)
        checkpoints = stack.enter_context(
            contextlib.closing(
                Checkpoints(workdir, every=every, keep=keep, frozen=freezer(config.optimizer, frozen))
            )
        )
        start = checkpoints.latest_step() or 0
        if checkpoints.latest_step() is None:
            state = create_state(method, optimizer, config.seed, shardings, method.pretrained())
        else:
            state = checkpoints.restore(abstract_state(method, optimizer, config.seed, shardings))
        iterator = batches(start)
        writer = stack.enter_context(
            contextlib.closing(
                MetricWriter(
                    workdir,
                    step=start,
                    tensorboard=config.get("tensorboard", False),
                    wandb=config.get("wandb", ""),
                    config=config.to_dict(),
                    write=first_process,
                )
            )
        )
        progress = stack.enter_context(contextlib.closing(Progress(steps, start, show=first_process)))
        log = _Log(
            writer, progress, int(config.get("log_every", 50)), batch_size, checkpoints.read_sums(start)
        )
        stop = stack.enter_context(StopRequest(checkpoints.reached_preemption))
        profile = stack.enter_context(Profile(config.get("profile", ""), workdir))
        if start:
            progress.say(f"continuing from the checkpoint at step {start}")

        step, stopped = start, False
        while True:
            stopped = stop.at(step) and step < steps

            # eval
            for evaluator in [] if stopped else evaluators:
                due = step > 0 and evaluator.every > 0 and step % evaluator.every == 0
                # A checkpoint saved because of SIGTERM precedes its evaluation, which is then run after resuming.
                if due and not writer.has(step, evaluator.name + "/"):
                    log.drain()
                    with log.pause():
                        scores = evaluator.run(state.averaged)
                    writer.scalars(step, {f"{evaluator.name}/{key}": value for key, value in scores.items()})
                    progress.say(f"step {step}, {evaluator.name}: {_line(scores)}")

            # save
            last = step >= steps
            if step != checkpoints.latest_step() and (
                (step > start and checkpoints.should_save(step)) or stopped or last
            ):
                log.drain()  # Raises an error if a step was not finite, so that no broken state is saved.
                with log.pause():
                    checkpoints.save(step, state, log.sums)
            if stopped or last:
                log.drain()
                checkpoints.wait()
                break

            profile.at(step, log.drain)
            # next batch
            with log.wait_for_data():
                batch = _next(iterator, step)
            # step
            state, metrics = train_step(state, put_batch(batch, mesh))
            step += 1
            # log
            log.put(step, metrics)

        if stopped:
            progress.say(f"saved at step {step}; run the same command to continue")
        return Fit(
            state,
            start,
            step,
            stopped,
            writer.records,
            log.seconds(),
            log.images_per_second(),
            log.data_wait_seconds,
        )


class _Log:
    """A log that reads the numbers of each step one step later, so that the device never waits for it.

    It accumulates (sum, count) pairs, writes their means every `every` steps, and measures the time of training without
    compilation, evaluation and saving.
    """

    def __init__(
        self,
        writer: MetricWriter,
        progress: Progress,
        every: int,
        batch_size: int,
        sums: metrics_lib.Sums,
    ):
        self._writer, self._progress = writer, progress
        self._every, self._batch_size = max(every, 1), batch_size
        self._pending: deque[tuple[int, Metrics]] = deque()
        self.sums = sums  # of the steps since the last record
        self._began = time.monotonic()
        self._earlier = max((r.get("seconds") or 0.0 for r in writer.records), default=0.0)
        # The clock of training starts after the first step, which includes compilation.
        self._clock: float | None = None
        self._steps, self._paused = 0, 0.0
        self._window = (0.0, 0)
        self.data_wait_seconds = 0.0

    def put(self, step: int, metrics: Metrics) -> None:
        """Takes the numbers of a step that was just dispatched, and reads those of the one before."""
        self._pending.append((step, metrics))
        while len(self._pending) > 1:
            self._read(*self._pending.popleft())

    def drain(self) -> None:
        """Reads all pending numbers; afterwards all steps so far are known to be finite."""
        while self._pending:
            self._read(*self._pending.popleft())

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Pauses the clock of training."""
        began = time.monotonic()
        yield
        if self._clock is not None:
            self._paused += time.monotonic() - began

    @contextlib.contextmanager
    def wait_for_data(self) -> Iterator[None]:
        """Adds the time inside the block to the time spent waiting for data."""
        began = time.monotonic()
        yield
        if self._clock is not None:
            self.data_wait_seconds += time.monotonic() - began

    def seconds(self) -> float:
        """Returns the wall time, including earlier starts of the run."""
        return self._earlier + time.monotonic() - self._began

    def images_per_second(self) -> float:
        """Returns the mean rate of this start."""
        return self._steps * self._batch_size / max(self._trained(), 1e-9) if self._steps else 0.0

    def _trained(self) -> float:
        return 0.0 if self._clock is None else time.monotonic() - self._clock - self._paused

    def _read(self, step: int, metrics: Metrics) -> None:
        sums = metrics_lib.to_host(metrics)
        if bad := metrics_lib.not_finite(sums):
            raise UserError(
                f"training stopped at step {step}, where {', '.join(bad)} is not finite; the last "
                "checkpoint is kept: try a lower learning_rate, more warmup_steps or a smaller clip_norm."
            )
        self.sums = metrics_lib.add(self.sums, sums)
        if self._clock is None:
            self._clock = time.monotonic()
        else:
            self._steps += 1
        if step % self._every == 0:
            seconds, steps = self._trained() - self._window[0], self._steps - self._window[1]
            self._window = (self._trained(), self._steps)
            rate = steps * self._batch_size / seconds if steps and seconds > 0 else 0.0
            values = {**metrics_lib.means(self.sums), "images_per_second": rate, "seconds": self.seconds()}
            self._writer.scalars(step, values)
            self.sums = {}
        self._progress.update(step, metrics_lib.means(sums)["loss"], self.images_per_second())


def _next(iterator: Any, step: int) -> Mapping[str, Any]:
    try:
        return next(iterator)
    except StopIteration:
        raise UserError(f"the training data ended after {step} batches; it must repeat endlessly.") from None


def _line(scores: Mapping[str, float]) -> str:
    """Formats the main scores; all of them are in metrics.jsonl."""
    shown = {
        name: value for name, value in scores.items() if not re.search("chance|_gt|@.*@|@none|@truth", name)
    }
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
