"""A comparison of prompts on segmentation, for two finished runs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from ovseg_jax.data.source_base import check_provides
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.load import load_run
from ovseg_jax.experiment.tables import Table
from ovseg_jax.experiment.transfer import TransferEvaluator, load_proposals, rules_of, with_masks
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import Classifier
from ovseg_jax.towers.prompt_file import Prompt
from ovseg_jax.towers.templates import read_templates
from ovseg_jax.vocab.splits import load_split

LEARNED, SINGLE = "learned", "single"
HARD = {SINGLE: ("a sculpture of a {}.",)}
"""The single prompt of papers/000, table 13."""

# Column and metric, see `evals.confusion.scores`.
_COLUMNS = (
    *(("mIoU", "miou"), ("mIoU_gt", "miou_gt"), ("fwIoU", "fwiou"), ("mACC", "macc"), ("pACC", "pacc")),
    *(("hIoU", "hiou"), ("hIoU_gt", "hiou_gt"), ("seen", "miou/seen"), ("unseen", "miou/unseen")),
    *(("held_out", "miou/held_out"), ("chance", "chance_miou")),
)


def compare_prompts(
    proposals: str,
    checkpoint: str,
    *,
    data: str | None,
    split: str | None,
    ensemble: float,
    prompts: str,
    threshold: float,
    fill: str,
    batch: int | None,
    limit: int | None,
) -> str:
    """Scores prompts of one run's classifier on another run's masks; the arguments are the command's flags.

    Returns:
      The table in the first process; "" in the others.

    Raises:
      UserError: an argument or a file is invalid.
    """
    from ovseg_jax.data.pipeline import eval_batches  # grain's import takes long
    from ovseg_jax.data.sources.build import make_source

    # Errors in the request are reported before a model is loaded.
    asked = read_prompts(prompts)
    mesh = make_mesh()
    first = load_proposals(proposals, mesh, "--proposals")
    second = load_run(checkpoint, mesh, kind=Classifier, lacking="does not classify images")
    evaluation = evaluation_of(first.config, data, batch)
    if not evaluation:
        raise UserError(
            f"the run --proposals={proposals} has no segmentation evaluation: give --data=NAME,KEY=VALUE,..."
        )
    source = make_source(evaluation.pop("source"))
    check_provides(source, TransferEvaluator.needs, "--data")
    classes = load_split(source.classes, split) if split else source.classes
    processes = jax.process_count()
    batch_size = int(evaluation.pop("batch_size"))
    if batch_size < 1 or batch_size % processes:
        raise UserError(f"--batch={batch_size} is not a positive multiple of the {processes} processes")
    batches = partial(
        eval_batches,
        source,
        TransferEvaluator.needs,
        {"data": {**first.config.data, **evaluation}},
        batch_size=batch_size // processes,
        process_index=jax.process_index(),
        process_count=processes,
        limit=limit if limit is not None else evaluation.get("limit"),
    )
    rules = rules_of(first, second.config, ensemble, threshold, fill)
    rows = with_masks(first, batches, source, limit)
    evaluator = TransferEvaluator(
        "transfer", first, second.method, classes, rows, mesh, rules=rules, prompts=asked
    )
    found = evaluator.compare(second.variables)
    return table(found) if jax.process_index() == 0 else ""


def read_prompts(text: str) -> dict[str, tuple[str, ...] | Prompt | None]:
    """Parses a list of prompts such as "single; vild; learned"; None stands for the classifier's own.

    Raises:
      UserError: the list is empty, or a prompt is invalid.
    """
    names = [name for part in text.split(";") if (name := part.strip())]
    if not names:
        raise UserError(f"--prompts={text!r} names no prompt: give for example --prompts='vild; {LEARNED}'")
    return {name: None if name == LEARNED else HARD.get(name) or read_templates(name) for name in names}


def evaluation_of(config: ConfigDict, data: str | None, batch: int | None) -> dict[str, Any]:
    """Returns `source`, `batch_size` and changes of `config.data`, from --data or the run's own evaluation.

    The result is empty if there is neither.
    """
    own = [
        dict(e.items())
        for key in ("final_evals", "evals")
        for _, e in sorted((config.get(key) or {}).items())
    ]
    evaluation: dict[str, Any] = next((e for e in own if e.get("type", "segmentation") == "segmentation"), {})
    if data:
        evaluation = {"source": read_source(data), "batch_size": evaluation.get("batch_size", 8)}
    if evaluation and batch is not None:
        evaluation["batch_size"] = batch
    kept = ("source", "batch_size", "image_size", "label_size", "max_segments", "limit")
    return {key: evaluation[key] for key in kept if evaluation.get(key) is not None}


def read_source(text: str) -> dict[str, Any]:
    """Parses the config of a data source such as "coco,data_dir=DIR,split=val2017".

    Values that are whole numbers, true or false are converted, except for keys of paths, splits, files and groups. A
    value ends at the next `,key=`, so that a path may hold commas.
    """
    name, *items = text.split(",")
    settings: list[str] = []
    for item in items:
        if "=" in item or not settings:
            settings.append(item)
        else:
            settings[-1] += "," + item
    pairs = [setting.partition("=") for setting in settings]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise UserError(f"--data={text}: {wrong[0]!r} is not of the form key=value")
    words = {"true": True, "false": False}
    read = lambda v: int(v) if v.isdecimal() else words.get(v.lower(), v)
    return {
        "name": name.strip(),
        **{k.strip(): v if _is_text(k.strip()) else read(v) for k, _, v in pairs},
    }


def _is_text(key: str) -> bool:
    return key.endswith("dir") or key in ("split", "names", "labels", "group")


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Formats a line for each prompt; columns without any number are left out."""
    columns = [(title, key) for title, key in _COLUMNS if any(key in scores for scores in found.values())]
    lines = Table({"prompt": found}, [title for title, _ in columns])
    rows = (lines.line(name, *(scores.get(key) for _, key in columns)) for name, scores in found.items())
    return "\n".join([lines.head, *rows])
