"""Every command of README and the pages is run by a test that is named here, or stands in tests/README.md."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from test_commands import PAGES, ROOT, commands

HERE = Path(__file__).parent
# A command, as in tests/README.md, and the test that runs it in small: other folders, tiny networks, few steps.
RUN = {
    "main": "experiment/test_main.py::test_a_run_leaves_what_it_promises",
    "main --config=configs/openseg.py": "test_notebook.py::test_openseg",
    "main --config=configs/openseg.py --workdir=* --mode=eval": "experiment/test_main.py::test_evaluation_alone",
    "main *openseg.py:data=folder*": "experiment/test_end_to_end.py::test_teacher_student_and_prediction",
    "main *openseg.py:images=200,captioned=9800,pseudo=true": "inference/test_pseudo_processes.py::*",
    "main *openseg.py:method=lseg": "experiment/test_end_to_end.py::test_the_baseline_on_scenes",
    "main *groupvit.py:data=sets*": "methods/test_groupvit_method.py::test_a_run_is_scored_and_segments",
    "main *maskformer.py*": "methods/test_maskformer_method.py::test_a_short_run",
    "main *mask2former.py*": "methods/test_mask2former_method.py::test_a_short_run",
    "main *configs/pomp.py*": "experiment/test_stages.py::test_the_summary_compares_prompts",
    "main *pomp_segments.py:run=*": "experiment/test_stages.py::test_its_prompt_is_tuned_on_segments",
    "main *configs/pseg.py": "test_notebook.py::test_pseg",
    "main *pseg.py:plus=true*": "experiment/test_pseg_run.py::test_a_run_and_its_student_read_no_mask",
    "main *umg_clip.py*": "test_notebook.py::test_panoptic",
    "main *upernet.py:teacher=*": "inference/test_pseudo_label_maps.py::test_a_teacher_labels_images_for_a_student",
    "demo *": "page/test_answers.py::test_the_command_builds_the_page",
    "export *--to=torch*": "test_export.py::test_pytorch_gives_the_same_labels",
    "export *--to=onnx*": "test_export.py::*",
    "plan*": "costs/test_plan.py::test_the_command",
    "predict": "test_predict.py::test_a_folder_with_a_bad_file",
    "predict --checkpoint=*": "test_predict.py::test_a_folder_with_a_bad_file",
    "predict --labels=vectors.npz": "test_predict.py::test_labels_with_vectors",
    "predict --model=*": "methods/test_published.py::test_the_command_segments_by_a_published_model",
    "predict --proposals=*": "experiment/test_stages.py::test_a_classifier_segments_with_the_masks_of_another_run",
    "predict --protocol=voc": "methods/test_groupvit_method.py::test_a_run_is_scored_and_segments",
    "prepare": "datasets/test_prepare.py::*",
    "prepare --list": "test_packaging.py::test_the_verbs_are_the_commands",
    "prompts*": "test_prompts.py::test_vectors_as_detic_reads_them",
    "pseudo_label *": "experiment/test_end_to_end.py::test_teacher_student_and_prediction",
    "report*": "experiment/test_paper_tables.py::test_the_list_has_every_row",
    "score": "test_score.py::test_a_kind_explains_itself",
    "score boxes *": "scoring/test_detections.py::test_cocos_scores_are_those_of_pycocotools",
    "score instances *": "scoring/test_detections.py::test_cocos_scores_are_those_of_pycocotools",
    "score proposals *": "scoring/test_detections.py::*",
    "score classification *": "scoring/test_classification.py::test_scores_of_every_form",
    "score classify_boxes *": "scoring/test_classify_boxes.py::test_a_perfect_classifier_has_a_perfect_score",
    "score panoptic *": "scoring/test_panoptic_files.py::test_text",
    "score retrieval *": "scoring/test_retrieval.py::test_five_captions_an_image",
    "score semantic*": "scoring/test_semantic.py::test_by_hand",
    "score suite *": "scoring/test_suite.py::test_a_suite_of_folders",
    "score transfer *": "scoring/test_transfer.py::test_a_line_for_each_prompt",
}
README = (HERE / "README.md").read_text("utf-8")
NOT_RUN = re.findall(r"^\| `([^`|]*)` \|", README, re.M)


@pytest.fixture(scope="module")
def shown():
    pages = [path for path in PAGES if path.suffix == ".md" and path != HERE / "README.md"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return {" ".join([verb, *given]) for page in pages for verb, given in commands(page)}


def test_every_command_is_run_by_a_test_or_listed_with_the_reason(shown):
    new = {each for each in shown if not any(fnmatchcase(each, pattern) for pattern in (*NOT_RUN, *RUN))}
    assert not new, "name the test that runs it in RUN, or put it with the reason into tests/README.md"


@pytest.mark.parametrize("pattern", [*NOT_RUN, *RUN])
def test_no_entry_is_left_of_a_command_that_has_gone(shown, pattern):
    assert any(fnmatchcase(each, pattern) for each in shown)


@pytest.mark.parametrize("place", sorted({*RUN.values(), *re.findall(r"`([\w/]+\.py)`", README)}))
def test_a_test_that_is_named_exists(place):
    file, _, name = place.partition("::")
    (path,) = {HERE / file} if (HERE / file).exists() else set(HERE.rglob(file))
    assert name in ("", "*") or f"def {name}(" in path.read_text("utf-8")
