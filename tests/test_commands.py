"""Every command that README, the pages and the docstrings show is one that exists, with flags and keys that exist."""

import ast
import copy
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

ROOT = Path(__file__).parents[1]
ARGPARSE = ("predict", "score", "prompts", "pseudo_label", "export", "prepare", "report", "annotate", "demo")
ABSL = ("main", "plan")
KINDS = {"score"}  # the commands whose first word is a kind of theirs
CONFIGS = sorted(
    path.name for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text()
)
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("*/*.md")),
    *sorted(ROOT.glob("*/*/*.md")),
    *sorted(ROOT.glob("configs/**/*.py")),
    *sorted(ROOT.glob("ovseg_jax/**/*.py")),
    *sorted(ROOT.glob("notebooks/*.ipynb")),
]


def texts(path):
    """What a page says: its text, the strings of a module, the cells of a notebook."""
    if path.suffix == ".md":
        return [path.read_text("utf-8")]
    if path.suffix == ".ipynb":
        return ["".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"]]
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
            found.append("".join(parts))
    return found


def spans(text):
    """Lines of code blocks, and what stands between backticks, on a line each."""
    text = re.sub(r"\\\s*\n\s*", " ", text)
    for i, part in enumerate(text.split("```")):
        if i % 2:
            yield from part.splitlines()
        else:
            inline = re.compile(r"`([^`]*)`")
            yield from (" ".join(span.split()) for span in inline.findall(part))
            yield from inline.sub("", part).splitlines()


def words(text):
    """The flags behind a command, up to what is none; placeholders for numbers are 1."""
    text = re.sub(r"(?<==)[A-Z](?=[\s,\]]|$)", "1", text.split(" #")[0])
    try:
        parts = shlex.split(text)
    except ValueError:  # a quotation mark of the sentence around it
        parts = text.split()
    found = []
    for part in parts:
        part = part.strip("[]()")
        if not part.startswith("--"):
            break
        found.append(part.rstrip(";:").split("|")[0])
    return found


def commands(path):
    """(verb, flags) of each command; in "...:data=coco" and "...,seed=1" the dots are the last one's config."""
    full = last = "configs/openseg.py"
    for text in texts(path):
        for line in spans(text):
            if "python -m ovseg_jax." not in line:
                if path.suffix == ".md" and (match := re.match(r"\.\.\.([:,])(\S+)$", line)):
                    if match[1] == ":":
                        fragment = [f"{full.split(':')[0]}:{match[2]}"]
                    else:  # behind the last command, or behind the last piece of one
                        fragment = [f"{start},{match[2]}" for start in (full, last)]
                    last = next((f for f in fragment if accepts("main", [f"--config={f}"])), fragment[0])
                    yield "main", [f"--config={last}"]
                continue
            for match in re.finditer(r"python -m ovseg_jax\.(\w+)(?: ([a-z_]+)\b)?", line):
                kind = [match[2]] if match[1] in KINDS and match[2] else []
                given = kind + words(line[match.end() if kind else match.end(1) :])
                given = ["--config=configs/openseg.py" if w == "--config=..." else w for w in given]
                given = [re.sub(r"(configs/)?FILE\.py", "configs/openseg.py", w) for w in given]
                given = [w.replace(":key=value,...", "") for w in given if ".key=" not in w]
                for word in given:
                    if word.startswith("--config="):
                        full = last = word.removeprefix("--config=")
                if match[1] != "X":
                    yield match[1], given


def subcommands(parser):
    """The parsers of a command's subcommands, by name, with their flags."""
    found = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    for each in (each for choices in found for each in choices.values()):
        each.fill()
    return found[0] if found else {}


def parse(verb, given):
    """Parses as the command does, without running it; raises where it would."""
    module = importlib.import_module(f"ovseg_jax.{verb}")
    if verb in ARGPARSE:
        parser = module.parser()
        parsers = [parser, *subcommands(parser).values()]
        assert (len(parsers) > 1) == (verb in KINDS)
        for action in (action for each in parsers for action in each._actions):
            action.required = False  # A sentence may show a part of a command.
        parser.parse_args(given)
        return
    assert verb in ABSL, f"no command {verb}"
    own = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=own)
    for flag in flags.FLAGS.flags_by_module_dict()[f"ovseg_jax.{verb}"]:
        own[flag.name] = copy.deepcopy(flag)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *given])  # where config_flags looks for `--config.key=value`
        own(sys.argv)
    if any(word.startswith("--config=") for word in given):
        assert config.value is not None


@pytest.fixture
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_of_a_page_parse(root, path):
    for verb, given in commands(path):
        try:
            parse(verb, given)
        except Exception as error:
            pytest.fail(f"python -m ovseg_jax.{verb} {' '.join(given)}: {error!r}")


def test_the_commands_are_found():
    assert len(list(commands(ROOT / "README.md"))) > 15
    found = [command for path in PAGES if path.suffix == ".md" for command in commands(path)]
    assert {verb for verb, _ in found} >= {*ARGPARSE, *ABSL} and len(found) > 60
    assert any("narratives=" in word for _, given in found for word in given)
    kinds = {given[0] for verb, given in found if verb in KINDS and given and given[0][0] != "-"}
    assert kinds == subcommands(importlib.import_module("ovseg_jax.score").parser()).keys()
    docs = [verb for path in PAGES if path.suffix == ".py" for verb, _ in commands(path)]
    assert set(docs) >= {*ARGPARSE, *ABSL}


@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if path.suffix == ".md"],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        file, _, place = target.partition("#")
        if "://" in target:
            continue
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), target
        titles = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M) if place else []
        assert not place or place in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles], (
            target
        )


def loose_keys():
    """Keys that a page speaks of by themselves, such as `--config.accumulate=4`."""
    for path in PAGES:
        for line in (line for text in texts(path) for line in spans(text)):
            if line.startswith("--config.") and path.suffix == ".md":
                yield from (word for word in words(line) if "=" in word)


def accepts(verb, given):
    try:
        parse(verb, given)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("word", sorted(set(loose_keys())))
def test_a_key_of_a_config_exists(root, word):
    recipes = [*CONFIGS, "openseg.py:data=coco,data_dir=x", "pomp.py:data=folder,data_dir=x"]
    assert any(accepts("main", [f"--config=configs/{recipe}", word]) for recipe in recipes), word


@pytest.mark.parametrize("config", CONFIGS)
def test_averaged_parameters_are_a_key_of_every_config(root, config):
    assert accepts("main", [f"--config=configs/{config}", "--config.optimizer.ema=0.999"])


@pytest.mark.parametrize("verb", ARGPARSE)
def test_a_command_parses_calls_and_prints(verb):
    """Nothing else lives at the top level, and no command imports another."""
    tree = ast.parse((ROOT / "ovseg_jax" / f"{verb}.py").read_text("utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"main", "parser", "_run"} <= functions <= {"main", "parser", "_run", "_tile"}
    assert not any(isinstance(node, ast.ClassDef) for node in tree.body)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {f"ovseg_jax.{other}" for other in (*ARGPARSE, *ABSL)}
