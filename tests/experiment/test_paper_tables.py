"""Every row of every table of papers/004, 000, 002 and 003: configs build, commands parse, keys are scores."""

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

from ovseg_jax import report
from ovseg_jax.config import to_json
from ovseg_jax.configs import openseg, pomp
from ovseg_jax.configs.tables import all_tables, build, row_config
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.keys import check_config
from ovseg_jax.experiment.paper_report import compare, read_run
from ovseg_jax.experiment.paper_tables import SUITE
from ovseg_jax.experiment.scores import SUITES, Score, write_scores
from tests.test_commands import parse

ROOT = Path(__file__).parents[2]
TABLES = {(table.paper, table.number): table for table in all_tables()}
ROWS = {table.place(row): (table, row) for table in TABLES.values() for row in table.rows}
AVERAGES = ("cross-dataset", "cross-domain", "umg_clip")
METRICS = {
    "proposals": ("recall@0.5", "recall@0.7", "recall@0.9"),
    "retrieval": (
        "R@1",
        *(f"{a}_to_{b}_R@{k}" for a, b in (("image", "text"), ("text", "image")) for k in (1, 5, 10)),
    ),
    "panoptic": ("pq",),
    "instances": ("ap",),
}
RUN = {place: pair for place, pair in ROWS.items() if pair[1].config}


@pytest.fixture
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


def config_of(command):
    """The config that a command's flags give."""
    own, argv = flags.FlagValues(), shlex.split(command)[2:]
    config = config_flags.DEFINE_config_file("config", flag_values=own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", argv)
        own(argv)
    return config.value


def values(paper, number):
    return {row.name: row.values for row in TABLES[paper, number].rows}


def test_all_tables_are_there():
    wanted = [("openseg", n) for n in range(1, 11)] + [("pomp", n) for n in range(1, 14)]
    wanted += [("pseg", n) for n in (1, 2, 3, 4, 7, 8, 9)]  # 5 and 6 have no scores, 10 and 11 are recipes
    wanted += [("umg_clip", n) for n in range(2, 11)]  # 1 and 11 to 14 are of the data
    assert list(TABLES) == wanted and len(ROWS) == sum(len(table.rows) for table in TABLES.values())


@pytest.mark.parametrize("place", ROWS)
def test_a_row_runs_or_says_why_not(place):
    table, row = ROWS[place]
    assert re.fullmatch(r"[A-Za-z0-9.+-]+", row.name)
    assert len(row.values) == len(table.columns)
    assert bool(row.config) != bool(row.why)
    assert len(row.keys) == (len(table.columns) if row.config else 0)
    assert row.config or not (row.args or row.after or row.differs)


@pytest.mark.parametrize("place", RUN)
def test_the_commands_of_a_row_are_its_config(root, place):
    """What the table's command gives is what the exact arguments give, and no key is unknown."""
    table, row = RUN[place]
    config, plain = config_of(table.command(row)), config_of(row.command)
    check_config(config)
    assert config.row == place
    with config.unlocked():
        del config["row"]
    assert to_json(config) == to_json(plain)
    if row.after:
        verb, *given = shlex.split(row.after)[2:]
        parse(verb.removeprefix("ovseg_jax."), given)


@pytest.mark.parametrize("place", RUN)
def test_the_scores_of_a_row_are_metrics_of_its_run(place):
    table, row = RUN[place]
    config = build(table, row)
    for key in filter(None, "&".join(row.keys).split("&")):
        folder, score = key.split("/", 1)
        if (own := config.final_evals.get(folder)) and own.type == "transfer":
            score, _, prompt = score.removesuffix("]").partition("[")
            assert not prompt or prompt in own.prompts
            split = ("hiou", "miou/seen", "miou/unseen") if own.get("split") else ()
            assert score in ("miou", "fwiou", "macc", "pacc", *split)
            continue
        name, metric, _, prompt = re.fullmatch(r"(.*)/([\w@.]+)(\[(\w+)\])?", key).groups()
        if name.startswith(SUITE):
            assert row.after and metric == "accuracy" and prompt in (None, "hard")
            name = name.removeprefix(SUITE)
            assert name in SUITES["pomp"] | SUITES["umg_clip"] or name in AVERAGES
            continue
        evaluation = config.final_evals[name]
        if evaluation.type in METRICS:
            assert metric in METRICS[evaluation.type]
        elif evaluation.type == "segmentation":
            metric, _, mode = metric.partition("@")
            assert metric in ("miou", "grounding_miou") and (not mode or mode in evaluation.masks[1:])
        else:
            assert metric == "accuracy" and (prompt is None or prompt in evaluation.prompts)


def test_published_scores_agree_with_what_the_papers_say_of_them():
    """Differences, averages and harmonic means that tables and text give beside the scores."""
    four = values("openseg", 4)
    assert np.subtract(four["OpenSeg-no-masks"], four["OpenSeg"]) == pytest.approx([-1.7, -3.1, -4.7, -10])
    assert np.subtract(four["OpenSeg-true-masks"], four["OpenSeg"]) == pytest.approx([2.8, 3.3, 6.4, 7.2])
    ten = values("openseg", 10)
    gain = np.subtract(ten["COCO-eng"][:4], ten["COCO"][:4])
    assert gain == pytest.approx([0.5, 1.0, 3.7, 4.3]) and gain.mean() == pytest.approx(2.4, abs=0.05)
    gain = np.subtract(ten["COCO+narratives-eng"], ten["COCO+narratives"])
    assert gain == pytest.approx([0.8, 0.6, 2.9, 3.1, 0.1, 0.7, 1.3, 2.7])
    eight = values("openseg", 8)
    assert eight["COCO"][0] - eight["COCO-no-masks"][0] == pytest.approx(3.8)
    assert eight["COCO"][1] - eight["COCO-no-masks"][1] == pytest.approx(5.7)
    best = values("openseg", 2)["OpenSeg-B7-prompt-eng"]
    assert best[4] - 52.3 == pytest.approx(19.9)
    for row in values("pomp", 2).values():
        assert np.mean(row[:10]) == pytest.approx(row[10], abs=0.06)
        assert np.mean(row[11:15]) == pytest.approx(row[15], abs=0.06)
    four = values("pomp", 4)  # SPNet's and CaGNet's scores on VOC contradict themselves in the paper
    triples = [four["ZegFormer"][:3], four["ZegFormer"][3:]]
    triples += [four[f"{name}-COCO-Stuff"][:3] for name in ("ZSSeg", "POMP")]
    triples += [four[f"{name}-VOC"][3:] for name in ("ZSSeg", "POMP")]
    for harmonic, seen, unseen in triples:
        assert 2 * seen * unseen / (seen + unseen) == pytest.approx(harmonic, abs=0.2)
    eight, four, nine = (values("pseg", n) for n in (8, 4, 9))
    for name, mean in {"P-Seg-12M": 30.1, "P-Seg-26M": 37.1, "P-Seg+12M": 34.9, "P-Seg+26M": 42.6}.items():
        assert np.mean(eight[name]) == pytest.approx(mean, abs=0.06)
    assert np.subtract(four["P-Seg"], four["GroupViT-RedCaps"]) == pytest.approx([2.4, 4.2, 2.8])
    for row in nine.values():
        assert np.mean(row[:-1]) == pytest.approx(row[-1], abs=0.06)
    two, three, four, five = (values("umg_clip", n) for n in (2, 3, 4, 5))
    for row in two.values():
        assert np.mean(row[:-1]) == pytest.approx(row[-1], abs=0.06)
    for best, other, gain in (
        ("L", "OpenAI-CLIP", 3.3),
        ("L", "EVA-02-CLIP", 0.5),
        ("E", "EVA-02-CLIP", 1.0),
    ):
        assert two[f"UMG-CLIP-{best}14"][-1] - two[f"{other}-{best}14"][-1] == pytest.approx(gain)
    gain = np.subtract(three["UMG-CLIP-E14"], three["EVA-02-CLIP-E14"])
    assert gain[[0, 3]] == pytest.approx([5.3, 7.0])
    for name in four.keys() & five.keys() - {"ODISE", "MaskCLIP"}:
        assert four[name][2] == five[name][0]
    assert values("umg_clip", 10)["896-with"] == (*four["UMG-CLIP-L14"][:3], *four["UMG-CLIP-L14"][6:])
    seven = values("umg_clip", 7)
    assert seven["captions-dense"][2] - seven["image-captions-dense"][2] == pytest.approx(2.2)
    one, three = values("pomp", 1), values("pomp", 8)
    assert one["POMP-B16"][0] - one["ZeroshotCLIP-B16"][0] == pytest.approx(3.5)
    assert one["POMP-B16"][0] - one["LinearProbe-B16"][0] == pytest.approx(4.4)
    assert one["POMP-B16"][0] - one["VPT-B16"][0] == pytest.approx(0.5)
    assert np.subtract(three["K1000"], three["no-correction"]) == pytest.approx([0.3, 1.2, 1.0])


def test_pomp_on_imagenet_1k_takes_the_steps_of_coop():
    """Table 3 compares them: the same images a step, views, augmentation and epochs."""
    ours, coop = (
        row_config(all_tables(["pomp"]), f"table=3,row={name}").to_dict() for name in ("POMP-K256", "CoOp")
    )
    assert (ours["loss"]["sample"], coop["loss"]["sample"]) == (256, 0) and ours["steps"] == 25_000
    for one in (ours, coop):
        del one["loss"], one["row"]
    assert ours == coop


def test_a_row_takes_my_folders_and_my_seed():
    config = row_config(
        all_tables(["openseg"]), "table=5,row=noun+adj,data_dir=/coco,eval_sets=gs://b/sets,seed=3"
    )
    assert config.data.train[0]["data_dir"] == "/coco" and config.seed == 3
    assert config.final_evals["PC-59"].source.data_dir == "gs://b/sets/PC-59"
    assert config.row == "openseg:table=5,row=noun+adj"


def test_a_row_takes_narratives_as_prepared():
    own = "narratives=a;b,narratives_are=prepared"
    config = row_config(all_tables(["openseg"]), f"table=3,row=NoisyStudent,{own}")
    assert [part["name"] for part in config.data.train[1]["sources"]] == ["prepared", "prepared"]
    with pytest.raises(UserError, match="narratives_are=prepared has no place in table 5"):
        row_config(all_tables(["openseg"]), "table=5,row=noun+adj,narratives_are=prepared")


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("table=99,row=x", "table=99: the tables are 1, 2, 3"),
        ("", r"table=\(missing\)"),
        ("table=2,row=LSegg", r"row=LSegg \(did you mean 'LSeg'\?\): the rows of table 2 are LSeg-ViT-L16, "),
        ("table=3,row=ALIGN", "table 3, row ALIGN cannot be run: ALIGN's weights were never released"),
        ("table=2,row=LSeg+,narratives=x,data=scenes", "unknown config key 'data'"),
        ("table=3,row=random,weights=x", "weights=x has no effect with .*init=scratch"),
    ],
)
def test_a_wrong_row_is_a_sentence(arg, message):
    with pytest.raises(UserError, match=message):
        row_config(all_tables(["openseg"]), arg)


def write_run(folder, config, scores):
    folder.mkdir()
    (folder / "config.json").write_text(to_json(config))
    (folder / "summary.json").write_text(json.dumps({"steps": 9, "drawn": True, **scores}))
    return str(folder)


def suite_scores(prompts=("", "hard"), suite="pomp"):
    """Scores of all sets: the accuracy of set i is i, with the hard prompt i / 2."""
    for i, (name, entry) in enumerate(SUITES[suite].items()):
        for prompt in prompts:
            value = i / 2 if prompt else float(i)
            yield Score(
                name, entry.get("average", ""), prompt, "accuracy", value, 9, 2, value, None, 1.0, 1, 1, 50
            )


def test_runs_stand_below_the_rows_of_the_papers(tmp_path, capsys):
    coco = build(*ROWS["openseg:table=5,row=noun+adj"])
    mine = write_run(tmp_path / "mine", coco, {"A-847/miou": 1.25, "PC-59/miou": 40.0, "validation/miou": 3})
    best = write_run(
        tmp_path / "best", build(*ROWS["pomp:table=12,row=uniform"]), {"validation/accuracy": 25}
    )
    write_scores(Path(best) / "scores.csv", list(suite_scores()))
    free = write_run(tmp_path / "free", openseg.get_config("seed=2"), {"test/miou": 80.0})
    out, png = tmp_path / "r.md", tmp_path / "r.png"
    assert report.main([mine, best, free, f"--out={out}", f"--png={png}"]) == 0
    printed = capsys.readouterr()
    assert f"{free} belongs to no row of a table" in printed.err and mine not in printed.err
    assert out.read_text() == printed.out
    lines = printed.out.splitlines()
    heads = [line for line in lines if line.startswith("###")]
    assert [head.split(":")[0] for head in heads] == [
        *(f"### openseg, table {n}" for n in (5, 8)),
        *(f"### pomp, table {n}" for n in (2, 8, 9, 12)),
    ]
    at = lines.index("| noun+adj | 6.3 | 9.0 | 21.1 | 42.1 |")
    assert lines[at + 1] == f"| *{mine}, seed 0* | *1.2* | - | - | *40.0* |"
    hard = next(k for k, line in enumerate(lines) if line.startswith("| hard-prompt"))
    assert lines[hard + 1].split(" | ")[1:3] == ["*0.5*", "*1.0*"]
    assert lines[hard + 1].split(" | ")[11] == f"*{np.mean(np.arange(1, 11)) / 2:.1f}*"
    uniform = next(k for k, line in enumerate(lines) if line.startswith("| uniform"))
    assert lines[uniform + 1].endswith("| *25.0* | *5.5* | *12.5* |")
    with Image.open(png) as picture:
        assert picture.size[0] > 500 and np.asarray(picture.convert("RGB")).std() > 5


def test_an_average_needs_all_of_its_sets(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, build(*ROWS["pomp:table=12,row=uniform"]), {})
    write_scores(folder / "scores.csv", [score for score in suite_scores() if score.set != "dtd"])
    scores = read_run(folder).scores
    assert f"{SUITE}cross-domain/accuracy" in scores and f"{SUITE}cross-dataset/accuracy" not in scores
    (found, *_) = compare([TABLES["pomp", 12]], [read_run(folder)])
    assert [line.values for line in found.lines if line.run] == [(None, None, 12.5)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "holds no run"),
        (lambda run: (run / "summary.json").unlink(), "has not finished"),
        (
            lambda run: (run / "summary.json").write_text("[1]"),
            "summary.json cannot be read: it is not an object",
        ),
        (lambda run: (run / "scores.csv").write_text("set,prompt\na"), "scores.csv cannot be read"),
        (lambda run: (run / "scores.csv").write_text('set,prompt\n"a'), "scores.csv cannot be read"),
        (
            lambda run: (run / "config.json").write_text(to_json(pomp.get_config())),
            "none of the runs belongs to a row",
        ),
    ],
)
def test_what_is_no_run_is_a_sentence(tmp_path, capsys, spoil, message):
    run = tmp_path / "run"
    write_run(run, build(*ROWS["openseg:table=5,row=noun+adj"]), {})
    spoil(run)
    assert report.main([str(run)]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_list_has_every_row(capsys):
    assert report.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {row.name}: " in printed for _, row in ROWS.values())
    assert printed.count("cannot be run: ") == len(ROWS) - len(RUN)
    assert (
        report.main([]) == 1 and report.main(["--list", "x"]) == 1 and report.main(["--list", "--out=x"]) == 1
    )


def test_tables_are_csv_columns_of_the_suite(tmp_path):
    """The columns that `read_run` reads are those that `score suite` writes."""
    path = tmp_path / "s.csv"
    write_scores(path, list(suite_scores()))
    with path.open() as file:
        assert {"set", "prompt", "accuracy", "per_class"} <= set(next(csv.reader(file)))


def test_a_column_may_be_the_mean_of_two_scores(tmp_path):
    place = "umg_clip:table=7,row=all"
    names = ("COCO-captions", "Flickr30k")
    folder = tmp_path / "run"
    write_run(
        folder, build(*ROWS[place]), {f"retrieval_{name}/R@1": 10.0 * k for k, name in enumerate(names)}
    )
    for left_out in ("", "pcam"):
        found = [s for s in suite_scores(("",), "umg_clip") if s.set != left_out]
        write_scores(folder / "scores.csv", found)
        own = [
            line.values
            for line in next(compare([TABLES["umg_clip", 7]], [read_run(folder)])).lines
            if line.run
        ]
        assert own == [(None if left_out else 10.0, 5.0, None)]


def test_rows_of_one_run_share_it():
    one, two, three = (TABLES["pomp", number] for number in (1, 2, 3))
    row = lambda table, name: next(row for row in table.rows if row.name == name)
    assert row(one, "MaPLe-B16").recipe == row(two, "MaPLe").recipe
    assert row(one, "CoOp-B16").recipe == row(three, "CoOp").recipe


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("table=5,row=noun+adj,narratives=x", "narratives=x has no place in table 5, row noun.adj"),
        ("table=8,row=COCO+narratives-no-masks,pseudo=true", "pseudo=true has no place in table 8"),
    ],
)
def test_an_argument_of_another_row_is_refused(place, message):
    with pytest.raises(UserError, match=message):
        row_config(all_tables(["openseg"]), place)
