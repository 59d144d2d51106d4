"""How the scores of a run are printed."""

from ovseg_jax.experiment.run import score_table


def test_a_classification_has_a_column_for_each_prompt():
    scores = {
        "val/accuracy": 67.0,
        "val/accuracy[hard]": 63.7,
        "val/chance": 1.0,
        "test/miou": 9.0,
        "test/pacc": 20.0,
    }
    lines = [line.split() for line in score_table(scores).splitlines()]
    assert lines[:3] == [["val", "hard"], ["accuracy", "67.00", "63.70"], ["chance", "1.00"]]
    assert lines[3:] == [["test", "mIoU", "mIoU_gt", "chance"], ["all", "classes", "9.00"], ["pacc", "20.00"]]
