"""How the scores of a run are printed."""

from ovseg_jax.experiment.tables import Table, score_table


def test_the_row_of_table_2_is_in_its_order():
    scores = {
        f"{name}/miou": 10.0 + k
        for k, name in enumerate(("A-150", "PAS-20", "PC-59", "A-847", "PC-459", "mine"))
    }
    scores["A-847/grounding_miou"] = 25.04
    lines = [line.split() for line in score_table(scores).splitlines()][-3:]
    assert lines[0] == ["A-847", "PC-459", "A-150", "PC-59", "PAS-20", "mine"]
    assert lines[1] == ["mIoU", "13.0", "14.0", "10.0", "12.0", "11.0", "15.0"]
    assert lines[2] == ["mIoU,", "classes", "given", "25.0"]


def test_more_names_stand_below_the_own_ones():
    """Table 2's last two rows."""
    scores = {"A-847/miou": 8.1, "A-847+eng/miou": 8.8, "A-150/miou": 26.4, "A-150+eng/miou": 28.6}
    lines = [line.split() for line in score_table(scores).splitlines()][-3:]
    assert lines == [["A-847", "A-150"], ["mIoU", "8.1", "26.4"], ["mIoU,", "more", "names", "8.8", "28.6"]]


def test_one_set_has_no_row_of_its_own():
    assert len(score_table({"test/miou": 9.0}).splitlines()) == 2


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


def test_columns_of_several_evaluations_and_long_prompts_stay_apart():
    """Prompts longer than 13 letters ran into each other, and long metrics shifted their line."""
    long = {"a photo of a {}.": 1.0, "a bad photo of the {}.": 2.0}
    scores = {f"v/accuracy@held_out_of_all@own[{prompt}]": value for prompt, value in long.items()}
    head, line, *others = score_table({**scores, "w/accuracy": 100.0}).splitlines()
    ends = [head.index(prompt) + len(prompt) for prompt in long]
    assert line.split() == ["accuracy@held_out_of_all@own", "1.00", "2.00"]
    assert [line.index(number) + 4 for number in ("1.00", "2.00")] == ends
    assert all(f"  {prompt}" in head for prompt in long)
    assert others[1].index("100.00") > line.index("own")


def test_a_table_is_as_wide_as_it_needs():
    table = Table({"set": ["a long name"], "metric": []}, ["n", "a long title"])
    assert table.head == "set          metric          n  a long title"
    assert table.line("b", "x", 3, 2.0) == "b            x               3          2.00"
    assert table.line("b", "x", None, "-") == "b            x                             -"
    assert table.line("b", "a long text alone runs over") == "b            a long text alone runs over"
