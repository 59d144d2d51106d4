"""The label files of the package: official ids and names, every name of one class only."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from ovseg_jax.data.sources.folder import Folder
from ovseg_jax.datasets.ade20k import THINGS
from ovseg_jax.datasets.pascal_context import frequent_classes
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.class_files import read_class_file
from ovseg_jax.vocab.classes import LABEL_FILES, ClassList, as_classes, load_labels, read_label_file, rename
from tests.datasets.packing import png, unpacked

COCO = Path(__file__).parents[3] / "shared/data/coco_sample/annotations/panoptic_val2017.json"
IDS = {
    "ade20k_150": [*range(1, 151)],
    "pascal_context_59": [*range(1, 60)],
    "voc_2012": [*range(1, 21)],
    "coco_things": [k for k in range(1, 91) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)],
}
# The first official name of each class, from objectInfo150.txt.
ADE20K = """\
wall; building; sky; floor; tree; ceiling; road; bed; windowpane; grass; cabinet; sidewalk; person; earth; door; table;
mountain; plant; curtain; chair; car; water; painting; sofa; shelf; house; sea; mirror; rug; field; armchair; seat;
fence; desk; rock; wardrobe; lamp; bathtub; railing; cushion; base; box; column; signboard; chest of drawers; counter;
sand; sink; skyscraper; fireplace; refrigerator; grandstand; path; stairs; runway; case; pool table; pillow; screen
door; stairway; river; bridge; bookcase; blind; coffee table; toilet; flower; book; hill; bench; countertop; stove;
palm; kitchen island; computer; swivel chair; boat; bar; arcade machine; hovel; bus; towel; light; truck; tower;
chandelier; awning; streetlight; booth; television; airplane; dirt track; apparel; pole; land; bannister; escalator;
ottoman; bottle; buffet; poster; stage; van; ship; fountain; conveyer belt; canopy; washer; plaything; swimming pool;
stool; barrel; basket; waterfall; tent; bag; minibike; cradle; oven; ball; food; step; tank; trade name; microwave;
pot; bicycle; lake; dishwasher; screen; blanket; sculpture; hood; sconce; vase; traffic light; tray; ashcan; fan; pier;
crt screen; plate; monitor; bulletin board; shower; radiator; glass; clock; flag"""


def words(name: str) -> set[str]:
    return set(name.lower().split())


@pytest.mark.parametrize("name", LABEL_FILES)
def test_names_and_ids(name):
    classes = load_labels(name)
    assert list(classes.ids) == IDS.get(name, list(classes.ids))
    flat, _ = classes.flat()
    assert not [text for text, count in Counter(flat).items() if count > 1]
    assert all(re.fullmatch(r"[a-z][a-z' -]*[a-z]", text) for text in flat)
    assert read_label_file(name) == read_class_file(name) == as_classes(name) == classes


def official() -> dict[str, list[str]]:
    ade = " ".join(ADE20K.split()).split("; ")
    ade.insert(126, "animal")
    return {"ade20k_150": ade, "pascal_context_59": [n for (n,) in frequent_classes()[0].names]}


@pytest.mark.parametrize("name", ["ade20k_150", "pascal_context_59"])
def test_a_class_keeps_its_official_name_or_gets_a_context(name):
    for names, own in zip(load_labels(name).names, official()[name], strict=True):
        joined = {text.replace(" ", "") for text in names}
        assert own.replace(" ", "") in joined or any(words(own) <= words(text) for text in names), own


def test_names_of_coco():
    if not COCO.exists():
        pytest.skip("no COCO")
    categories = json.loads(COCO.read_text())["categories"]
    classes, things = load_labels("coco_panoptic"), load_labels("coco_things")
    assert list(classes.ids) == [c["id"] for c in categories]
    assert list(classes.isthing) == [bool(c["isthing"]) for c in categories]
    assert classes.names[:80] == things.names and classes.ids[:80] == things.ids and all(things.isthing)
    for names, c in zip(classes.names, categories, strict=True):
        own = re.sub(r"-(other|merged|stuff)", "", c["name"]).replace("-", " ")
        assert any(own == text.replace(" ", "") or words(own) & words(text) for text in names), c


def test_classes_and_things_are_those_of_the_readers():
    classes = frequent_classes()[0]
    named = rename(classes, "pascal_context_59")
    assert (named.ids, named.isthing) == (classes.ids, classes.isthing) and len(named.flat()[0]) > 200
    ade = load_labels("ade20k_150")
    assert tuple(k for k, thing in zip(ade.ids, ade.isthing, strict=True) if thing) == THINGS
    assert load_labels("pascal_context_59").isthing == classes.isthing
    assert all(load_labels("voc_2012").isthing)


def test_a_name_means_one_meaning():
    """Appendix I: a context in place of an ambiguous name."""
    index = load_labels("ade20k_150").index
    assert not index.keys() & {
        "fan",
        "glass",
        "bar",
        "blind",
        "screen",
        "tank",
        "hood",
        "palm",
        "light",
        "case",
    }
    assert "mouse" not in load_labels("coco_panoptic").index


def test_a_folder_takes_a_name(tmp_path):
    folder = unpacked(tmp_path, {"images/a.png": png([[[1, 2, 3]]]), "masks/a.png": png([[15]])})
    source = Folder(folder, kind="semantic", labels="voc_2012")
    assert source.classes.display(int(source[0]["class_ids"][0])) == "person"


def test_things_of_a_label_file(tmp_path):
    path = tmp_path / "l.txt"
    path.write_text("# things: 7\n1:sky\n7:dog\n# a note\n9:cat\n#things: 9 7\n")
    assert read_label_file(path).isthing == (False, True, True)
    path.write_text("# things:\n1:sky\n")
    assert read_label_file(path) == ClassList((("sky",),), (1,), (False,))
    path.write_text("# things: 1 2\n1:sky\n")
    with pytest.raises(UserError, match=r"l.txt: the thing '2' is the id of no category"):
        read_label_file(path)


def test_a_file_beside_goes_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("voc_2012").write_text("4:kite\n")
    assert len(load_labels("voc_2012")) == 20 and load_labels("./voc_2012").names == (("kite",),)
