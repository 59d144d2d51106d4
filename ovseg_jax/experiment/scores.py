"""Scores of a classifier on suites of data sets, with averages."""

import contextlib
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from ovseg_jax.cli.outputs import Journal, check_out_file, run_stamp
from ovseg_jax.data.prepared_files import MANIFEST, read_manifest
from ovseg_jax.errors import UserError
from ovseg_jax.evals.registry import make_evaluators
from ovseg_jax.experiment.load import load_run
from ovseg_jax.experiment.tables import Table
from ovseg_jax.files import locked_file, write_whole
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import Classifier
from ovseg_jax.reading import column, objects, read_json, reading, short, text, texts, whole
from ovseg_jax.vocab.splits import PER_CLASS
from ovseg_jax.vocab.templates import HARD

CROSS_DATASET = (
    *("caltech101", "oxford_pets", "stanford_cars", "flowers102", "food101"),
    *("fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"),
)
CROSS_DOMAIN = ("imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r")
# Table 2 of papers/003, in its order.
UMG_CLIP = (
    *("caltech101", "cifar10", "cifar100", "country211", "dtd", "eurosat", "fer2013", "gtsrb"),
    *("imagenet_sketch", "imagenet_a", "imagenet_r", "imagenet_v2", "mnist", "objectnet", "pcam"),
    *("rendered_sst2", "resisc45", "stl10", "sun397", "svhn", "voc2007"),
)


def _published(names: Sequence[str], average: str | None) -> dict[str, dict[str, Any]]:
    common: dict[str, Any] = {"average": average} if average else {}
    return {
        name: {
            **common,
            "metric": "per_class" if name in PER_CLASS else "accuracy",
            "prompts": {"hard": HARD[name]},
        }
        for name in names
    }


SUITES: dict[str, dict[str, dict[str, Any]]] = {
    "cross-dataset": _published(CROSS_DATASET, "cross-dataset"),
    "cross-domain": _published(CROSS_DOMAIN, "cross-domain"),
    "imagenet21k": _published(("imagenet21k",), None),
    "umg_clip": {name: {"average": "umg_clip"} for name in UMG_CLIP},
}
SUITES["pomp"] = SUITES["imagenet21k"] | SUITES["cross-dataset"] | SUITES["cross-domain"]


_OWN = "main metric of each"


class Score(NamedTuple):
    """The scores of a data set under a prompt, a line of the CSV file; in percent except alignment and uniformity.

    Attributes:
      set: the name of the data set in the suite.
      average: the average that it counts in, or "".
      prompt: the name of the prompt; "" for the method's own.
      metric: the main metric, whose value is `score`.
      images: the number of images that were classified among `classes` classes.
      accuracy, ..., chance: see `evals.classification.scores`.
    """

    set: str
    average: str
    prompt: str
    metric: str
    score: float
    images: int
    classes: int
    accuracy: float
    accuracy_5: float | None
    per_class: float
    alignment: float
    uniformity: float | None
    chance: float


def score_suite(
    checkpoint: str,
    suite: str,
    data_dir: str,
    *,
    step: int | None = None,
    batch: int = 64,
    out: str | None = None,
) -> None:
    """Prints a line for each data set of a suite and its averages, and optionally writes them as a CSV file.

    With `out`, finished sets are recorded beside it until all are done, so that a stopped command continues when it is
    run again.

    Args:
      checkpoint: the folder of a run that classifies images.
      suite: see `read_suite`.
      data_dir: the folder of the data sets.
      step: the step of the checkpoint; by default the latest.
      batch: number of images to classify at once.
      out: the CSV file.

    Raises:
      UserError: no data set of the suite exists, the run cannot be used, or the file cannot be written.
    """
    # Errors in the request are reported before the model is loaded.
    if batch < 1:
        raise UserError(f"--batch={batch} is less than 1")
    sets, folder = read_suite(suite), epath.Path(data_dir)
    sources = {name: source_of(name, entry, folder) for name, entry in sets.items()}
    if not any(sources.values()):
        raise UserError(
            f"--data_dir={data_dir} holds none of the sets of the suite: put them into {data_dir}/NAME, "
            f"such as {folder / next(iter(sets))}"
        )
    with contextlib.ExitStack() as stack:
        journal = None
        if out:
            check_out_file(out, {"--suite": suite})
            stack.enter_context(locked_file(out))
            journal = Journal(f"{out}.part.jsonl")
            stamp = run_stamp(checkpoint, step)
            journal.start({"checkpoint": checkpoint, "stamp": stamp, "data_dir": data_dir, "sets": sets})
        known: dict[str, list[Score]] = {}
        for record in journal.records if journal else ():
            known.setdefault(record["set"], []).append(Score(**record))
        table = suite_table(sets)
        print(table.head, flush=True)
        scores: list[Score] = []
        scorer: Scorer | None = None
        for name, source in sources.items():
            if source is None:
                print(table.line(name, f"missing: there is no folder {folder / name}"), flush=True)
                continue
            # A set whose recorded lines are incomplete is scored again.
            found = known.get(name, [])
            if [s.prompt for s in found] != ["", *sets[name].get("prompts", {})]:
                scorer = scorer or Scorer(checkpoint, step, batch)
                found = scorer.score(name, sets[name], source)
                for score in found if journal else ():
                    journal.append(score._asdict())  # type: ignore[union-attr]
            scores += found
            for metric in dict.fromkeys((found[0].metric, "accuracy")):
                by_prompt = {s.prompt: s.score if metric == s.metric else s.accuracy for s in found}
                cells = [by_prompt.get(prompt) for prompt in ("", *_prompts(sets))]
                images, classes, chance = found[0].images, found[0].classes, found[0].chance
                print(table.line(name, metric, images, classes, *cells, chance), flush=True)
            if out:
                write_scores(out, scores)
        for line in averages(sets, scores):
            print(line)
        if journal:
            journal.remove()


class Scorer:
    """A trained classifier that scores data sets."""

    def __init__(self, workdir: epath.PathLike, step: int | None, batch_size: int):
        """Loads the run.

        Raises:
          UserError: there is no run, or it does not classify images.
        """
        self._mesh, self._batch_size = make_mesh(), batch_size
        self._run = load_run(
            workdir, self._mesh, step=step, kind=Classifier, lacking="does not classify images"
        )

    def score(self, name: str, entry: Mapping[str, Any], source: Mapping[str, Any]) -> list[Score]:
        """Scores one data set under the method's own prompt and each of the entry's prompts."""
        metric = entry.get("metric", "accuracy")
        evaluation = {"type": "classification", "batch_size": self._batch_size, "source": dict(source)}
        chosen = {key: entry[key] for key in ("limit", "prompts") if key in entry}
        try:
            evals = ConfigDict({"sets": {name: {**evaluation, **chosen, "metric": metric}}})
        except ValueError as error:  # a name with a dot
            raise UserError(f"the set {name!r} of the suite: {error}") from error
        evals.data = self._run.config.data
        (evaluator,) = make_evaluators(evals, self._run.method, self._mesh, "sets")
        found, rows = evaluator.run(self._run.variables), evaluator.tables["accuracy"]

        def of_prompt(prompt: str) -> Score:
            get: Any = lambda key: found.get(f"{key}[{prompt}]" if prompt else key)
            return Score(
                set=name,
                average=entry.get("average", ""),
                prompt=prompt,
                metric=metric,
                score=get("score"),
                images=sum(row.images for row in rows),
                classes=len(rows),
                accuracy=get("accuracy"),
                accuracy_5=get("accuracy@5"),
                per_class=get("per_class"),
                alignment=get("alignment"),
                uniformity=get("uniformity"),
                chance=found["chance"],
            )

        return [of_prompt(prompt) for prompt in ("", *entry.get("prompts", {}))]


def read_suite(suite: str) -> dict[str, dict[str, Any]]:
    """Returns the data sets of a suite, given by its name or a JSON file; `score --help` describes the format.

    Raises:
      UserError: there is no such suite or file, or the file is not of that form.
    """
    if suite in SUITES:
        return SUITES[suite]
    path = epath.Path(suite)
    if not path.exists():
        raise UserError(f"--suite={suite} is neither a file nor one of {', '.join(SUITES)}")
    found = read_json(path, "the suite")
    with reading(path, "the suite"):
        sets = found.get("sets") if isinstance(found, dict) else None
        if not isinstance(sets, dict) or not sets:
            raise ValueError(f'it is not of the form {{"sets": {{NAME: {{...}}}}}}: {short(found)}')
        entries = objects(list(sets.values()), "'sets'")
        for key in ("metric", "average", "tfds"):
            column(entries, key, text, default="", of="set")
        column(entries, "limit", whole, 1, default=1, of="set")
        for templates in objects([entry.get("prompts", {}) for entry in entries], "'prompts'"):
            for prompt, template in templates.items():
                texts(template, f"the prompt {prompt!r}")
    return sets


def source_of(name: str, entry: Mapping[str, Any], data_dir: epath.Path) -> dict[str, Any] | None:
    """Returns the config of a data set's source; None if its folder is missing."""
    own = ("metric", "average", "prompts", "limit", "tfds")
    arguments = {key: value for key, value in entry.items() if key not in own}
    if "tfds" in entry:
        return {"name": "tfds", "dataset": entry["tfds"], "data_dir": str(data_dir), **arguments}
    folder = data_dir / name
    if not folder.is_dir():
        return None
    if (folder / MANIFEST).exists():
        held = read_manifest(folder)["splits"]
        split = next((split for split in ("test", "val") if split in held), next(iter(held)))
        return {"name": "prepared", "data_dir": str(folder), "split": split, **arguments}
    splits = [split for split in ("test", "val") if (folder / split).is_dir()]
    names = [str(folder / file) for file in ("names.txt", "names.json") if (folder / file).exists()]
    found = {"split": splits[0] if splits else "", "names": names[0] if names else ""}
    return {"name": "image_folder", "data_dir": str(folder), **found, **arguments}


def suite_table(suite: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns the table of a suite: a line for each set and metric, then those of `averages`."""
    found = [entry["average"] for entry in suite.values() if "average" in entry]
    metrics = ["accuracy", *(entry.get("metric", "accuracy") for entry in suite.values())]
    counts = [f"average of {len(found)} of {len(found)}, {_OWN}"] if found else []
    return Table(
        {"": [*suite, *found], "metric": [*metrics, *counts]},
        ["images", "classes", "score", *_prompts(suite), "chance"],
    )


def averages(suite: Mapping[str, Mapping[str, Any]], scores: Sequence[Score]) -> Iterator[str]:
    """Yields the lines of each average of the suite, the unweighted mean over its data sets.

    One line is of the main metric of each set, and one of the accuracy of all sets; where the main metric is accuracy
    everywhere, there is one line.
    """
    table = suite_table(suite)
    for average in dict.fromkeys(entry["average"] for entry in suite.values() if "average" in entry):
        wanted = [name for name, entry in suite.items() if entry.get("average") == average]
        mixed = any(suite[name].get("metric", "accuracy") != "accuracy" for name in wanted)
        counted = [s for s in scores if s.set in wanted]
        there = len({s.set for s in counted})
        of = f"average of {there} of {len(wanted)}" if there < len(wanted) else f"average of all {there}"
        for metric in dict.fromkeys((_OWN if mixed else "accuracy", "accuracy")):
            cells = []
            for prompt in ("", *_prompts(suite)):
                found = [
                    s.accuracy if metric == "accuracy" else s.score for s in counted if s.prompt == prompt
                ]
                cells.append(sum(found) / there if there and len(found) == there else None)
            yield table.line(average, f"{of}, {metric}", None, None, *cells)


def write_scores(path: epath.PathLike, scores: Sequence[Score]) -> None:
    """Writes a CSV file with a line for each score."""
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerow(Score._fields)
    writer.writerows(scores)
    write_whole(path, content.getvalue())


def _prompts(suite: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(prompt for entry in suite.values() for prompt in entry.get("prompts", {})))
