"""A classifier on many data sets: `python -m ovseg_jax.score --checkpoint=WORKDIR --suite=pomp --data_dir=DIR`."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from ovseg_jax.cli.console import complain, quieten, use_compilation_cache
from ovseg_jax.errors import UserError
from ovseg_jax.evals.runner import make_evaluators
from ovseg_jax.experiment.load import load_run
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import Classifier
from ovseg_jax.towers.templates import HARD

_DESCRIPTION = """\
Scores a trained classifier, zero-shot, on the data sets of a suite, and beside it a hand-written prompt.

  python -m ovseg_jax.score --checkpoint=runs/pomp --suite=pomp --data_dir=../sets --out=scores.csv

A suite is one of
  cross-dataset  the ten of POMP's table 2: {cross_dataset}
  cross-domain   its four variants of ImageNet: {cross_domain}
  imagenet21k    validation images of ImageNet-21K
  pomp           all of these
or a JSON file, {{"sets": {{NAME: {{...}}}}}}, where a set has any of
  metric     the measure that counts: accuracy (default), per_class, harmonic, ...
  average    the average that it belongs to
  prompts    {{NAME: template, list of templates, imagenet | simple | vild, or FILE.json}}
  tfds       name of a TFDS data set in DIR, in place of a folder
  split, names, ...   arguments of its data source, image_folder or tfds
  limit      only the first so many images
The images of a set lie in DIR/NAME/CLASS, or DIR/NAME/test/CLASS, or DIR/NAME/val/CLASS, and DIR/NAME/names.txt (or
names.json), if there is one, names the folders. A set without a folder is listed as missing, and an average then says
of how many sets it is.
"""

# papers/000, table 11 and FACTS: the mean over classes for four of them.
_PER_CLASS = ("caltech101", "oxford_pets", "flowers102", "fgvc_aircraft")
_CROSS_DATASET = (
    *("caltech101", "oxford_pets", "stanford_cars", "flowers102", "food101"),
    *("fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"),
)
_CROSS_DOMAIN = ("imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r")


def _published(names: Sequence[str], average: str | None) -> dict[str, dict[str, Any]]:
    common: dict[str, Any] = {"average": average} if average else {}
    return {
        name: {
            **common,
            "metric": "per_class" if name in _PER_CLASS else "accuracy",
            "prompts": {"hard": HARD[name]},
        }
        for name in names
    }


SUITES: dict[str, dict[str, dict[str, Any]]] = {
    "cross-dataset": _published(_CROSS_DATASET, "cross-dataset"),
    "cross-domain": _published(_CROSS_DOMAIN, "cross-domain"),
    "imagenet21k": _published(("imagenet21k",), None),
}
SUITES["pomp"] = SUITES["imagenet21k"] | SUITES["cross-dataset"] | SUITES["cross-domain"]


class Score(NamedTuple):
    """A data set under a prompt: a line of the CSV file. In percent but for alignment and uniformity.

    Attributes:
      set: its name in the suite.
      average: the average that it belongs to, or "".
      prompt: "" for the method's own.
      metric: the measure that counts, and `score` its value.
      images: how many were classified, and `classes` among how many.
      others: see `evals.classification.scores`.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status: 0, or 2 for a wrong request."""
    arguments = _parser().parse_args(argv)
    quieten()
    try:
        return _run(arguments)
    except UserError as error:
        return complain(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ovseg_jax.score",
        description=_DESCRIPTION.format(
            cross_dataset=" ".join(_CROSS_DATASET), cross_domain=" ".join(_CROSS_DOMAIN)
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="WORKDIR", help="the folder (or bucket) of a training run")
    add("--suite", required=True, metavar="NAME|FILE", help="what to score on, see above")
    add("--data_dir", required=True, metavar="DIR", help="where the sets are: DIR/NAME")
    add("--out", metavar="FILE.csv", help="also write everything measured, a line for each set and prompt")
    add("--batch", type=int, default=64, metavar="N", help="images at once (default %(default)s)")
    add("--step", type=int, metavar="N", help="the checkpoint of this step (default: the latest)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    # What can be wrong with the request is found before the model is loaded.
    if arguments.batch < 1:
        raise UserError(f"--batch={arguments.batch}: at least one image at once")
    suite = read_suite(arguments.suite)
    data_dir = epath.Path(arguments.data_dir)
    sources = {name: source_of(name, entry, data_dir) for name, entry in suite.items()}
    if not any(sources.values()):
        raise UserError(
            f"--data_dir={data_dir} holds none of the sets of the suite: put them into {data_dir}/NAME, "
            f"such as {data_dir / next(iter(suite))}"
        )
    print(_line("", "metric", "images", "classes", "score", *_prompts(suite), "chance"), flush=True)
    scores: list[Score] = []
    judge = Judge(arguments.checkpoint, arguments.step, arguments.batch)
    for name, source in sources.items():
        if source is None:
            print(f"{name:<18}missing: there is no folder {data_dir / name}", flush=True)
            continue
        found = judge.score(name, suite[name], source)
        scores += found
        print(_row(found, _prompts(suite)), flush=True)
        if arguments.out:
            write_scores(arguments.out, scores)
    for line in averages(suite, scores):
        print(line)
    return 0


class Judge:
    """A classifier of a finished run, which scores one data set after another."""

    def __init__(self, workdir: epath.PathLike, step: int | None, batch_size: int):
        """Loads it.

        Raises:
          UserError: there is no run, or one that does not classify.
        """
        self._mesh, self._batch_size = make_mesh(), batch_size
        self._run = load_run(workdir, self._mesh, step=step, kind=Classifier, lacking="classifies no images")

    def score(self, name: str, entry: Mapping[str, Any], source: Mapping[str, Any]) -> list[Score]:
        """Scores one set, under the method's own prompt and then under each of the entry's."""
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
    """The sets of a suite, by name or from a JSON file; see the command's help for what is in it.

    Raises:
      UserError: neither, or a file that is not of that form.
    """
    if suite in SUITES:
        return SUITES[suite]
    path = epath.Path(suite)
    if not path.exists():
        raise UserError(f"--suite={suite} is no file, and none of {', '.join(SUITES)}")
    try:
        sets = json.loads(path.read_text())["sets"]
        if not sets or not all(isinstance(entry, dict) for entry in sets.values()):
            raise ValueError("it names no set")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path} is not a suite, {{"sets": {{NAME: {{...}}}}}}: {error}') from error
    return sets


def source_of(name: str, entry: Mapping[str, Any], data_dir: epath.Path) -> dict[str, Any] | None:
    """What `make_source` makes the set of; None where its folder is missing."""
    own = ("metric", "average", "prompts", "limit", "tfds")
    arguments = {key: value for key, value in entry.items() if key not in own}
    if "tfds" in entry:
        return {"name": "tfds", "dataset": entry["tfds"], "data_dir": str(data_dir), **arguments}
    folder = data_dir / name
    if not folder.is_dir():
        return None
    splits = [split for split in ("test", "val") if (folder / split).is_dir()]
    names = [str(folder / file) for file in ("names.txt", "names.json") if (folder / file).exists()]
    found = {"split": splits[0] if splits else "", "names": names[0] if names else ""}
    return {"name": "image_folder", "data_dir": str(folder), **found, **arguments}


def averages(suite: Mapping[str, Mapping[str, Any]], scores: Sequence[Score]) -> Iterator[str]:
    """A line for each average of the suite: the unweighted mean over its sets, as published averages are."""
    for average in dict.fromkeys(entry["average"] for entry in suite.values() if "average" in entry):
        wanted = [name for name, entry in suite.items() if entry.get("average") == average]
        cells = []
        for prompt in ("", *_prompts(suite)):
            found = [s.score for s in scores if s.set in wanted and s.prompt == prompt]
            there = len({s.set for s in scores if s.set in wanted})
            cells.append(f"{sum(found) / there:.2f}" if there and len(found) == there else "")
        of = f"average of {there} of {len(wanted)}" if there < len(wanted) else f"average of all {there}"
        yield _line(average, of, "", "", *cells, "")


def write_scores(path: epath.PathLike, scores: Sequence[Score]) -> None:
    """Writes a CSV file with a line for each score."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(Score._fields)
    writer.writerows(scores)
    try:
        epath.Path(path).write_text(text.getvalue())
    except OSError as error:
        raise UserError(f"--out={path} cannot be written: {error.strerror or error}") from error


def _prompts(suite: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(prompt for entry in suite.values() for prompt in entry.get("prompts", {})))


def _row(found: Sequence[Score], prompts: Sequence[str]) -> str:
    by_prompt = {s.prompt: f"{s.score:.2f}" for s in found}
    first = found[0]
    cells = [by_prompt.get(prompt, "") for prompt in ("", *prompts)]
    return _line(
        first.set, first.metric, str(first.images), str(first.classes), *cells, f"{first.chance:.2f}"
    )


def _line(name: str, metric: str, *cells: str) -> str:
    images, classes, *numbers = cells
    line = f"{name:<18}{metric:<20}{images:>8}{classes:>9}" + "".join(f"{cell:>10}" for cell in numbers)
    return line.rstrip()


if __name__ == "__main__":
    use_compilation_cache()
    sys.exit(main())
