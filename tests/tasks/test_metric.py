import pytest

from matchdistill.tasks import TASKS
from matchdistill.tasks.metric import Metric, metrics_in

ACCURACY, LOSS = Metric("top1", "top-1"), Metric("loss", "loss", higher_is_better=False, share=False)


def test_as_they_are_shown():
    assert (ACCURACY.shown(0.9), LOSS.shown(0.9)) == ("90.00%", "0.9")


def test_the_best():
    assert (ACCURACY.best([0.5, 0.9, 0.7]), LOSS.best([0.5, 0.9, 0.7])) == (0.9, 0.5)


@pytest.mark.parametrize(
    ("metric", "alone", "own", "teacher", "share"),
    [
        (ACCURACY, 0.5, 0.6, 0.9, 0.25),
        (ACCURACY, 0.5, 0.4, 0.9, -0.25),
        (ACCURACY, 0.9, 0.9, 0.9, None),
        (ACCURACY, 0.9, 0.6, 0.5, None),
        (LOSS, 0.9, 0.8, 0.5, 0.25),
        (LOSS, 0.5, 0.8, 0.9, None),
    ],
)
def test_the_share_of_the_gap(metric, alone, own, teacher, share):
    assert metric.gap_recovered(alone, own, teacher) == (None if share is None else pytest.approx(share))


def test_metrics_of_names():
    assert metrics_in([ACCURACY, LOSS], {"loss": 1.0, "own": 2.0}) == [LOSS]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_name_and_label_of_a_task_is_there_once(task):
    for values in ([metric.name for metric in task.metrics], [metric.label for metric in task.metrics]):
        assert len(set(values)) == len(values)
