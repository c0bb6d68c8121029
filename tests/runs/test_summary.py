import numpy as np
import pytest
from scipy import stats

from matchdistill.runs.summary import MOST, Mean, alone_in_words, conclusion, seeds_needed, summarise
from matchdistill.tasks import TASKS
from matchdistill.tasks.metric import Metric
from records import run_of, runs_of


def test_statistics():
    alone, guided = [0.80, 0.83, 0.79, 0.86], [0.85, 0.85, 0.84, 0.87]
    none, amp = summarise(runs_of({"none": alone, "mgd-amp": guided}), ["none", "mgd-amp"])
    for entry, values in ((none, alone), (amp, guided)):
        low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
        assert entry.value.mean == pytest.approx(np.mean(values))
        assert entry.value.interval == pytest.approx((high - low) / 2)
        assert entry.seeds == [0, 1, 2, 3]
        assert entry.seconds == 3.5
    assert none.difference is None
    assert none.gap_recovered is None
    paired = stats.ttest_rel(guided, alone).confidence_interval(0.95)
    assert amp.difference.mean == pytest.approx((paired.low + paired.high) / 2)
    assert amp.difference.interval == pytest.approx((paired.high - paired.low) / 2)
    assert amp.gap_recovered == pytest.approx((np.mean(guided) - np.mean(alone)) / (0.95 - np.mean(alone)))


def test_pairs_go_by_seed_whatever_the_order():
    runs = runs_of({"none": [0.5, 0.9], "kd": [0.6, 1.0]})
    assert summarise(runs[::-1], ["kd"])[0].difference == Mean(pytest.approx(0.1), pytest.approx(0))


def test_summary_against_another_method():
    runs = runs_of({"none": [0.5, 0.6], "kd": [0.6, 0.6], "mgd-amp": [0.7, 0.8]}, teacher=0.9)
    none, kd, amp = summarise(runs, ["none", "kd", "mgd-amp"], base="mgd-amp")
    assert none.difference.mean == pytest.approx(-0.2)
    assert kd.difference.mean == pytest.approx(-0.15)
    assert none.gap_recovered == pytest.approx(-0.2 / 0.15)
    assert amp.difference is None


def test_summary_of_another_metric():
    found = {"none": 0.5, "kd": 0.7}
    runs = [run_of(name, 0, {"ap": 0.1, "ap50": value}, task="detection") for name, value in found.items()]
    ap50 = next(metric for metric in TASKS["detection"].metrics if metric.name == "ap50")
    first, second = (summarise(runs, list(found), metric=metric)[1] for metric in (None, ap50))
    assert first.difference.mean == 0
    assert second.value.mean == 0.7
    assert second.difference.mean == pytest.approx(0.2)


def test_a_single_seed_has_no_interval():
    none, kd = summarise(runs_of({"none": [0.5], "kd": [0.7]}, teacher=0.9), ["none", "kd"])
    assert none.value == Mean(0.5, None)
    assert kd.difference.interval is None
    assert kd.gap_recovered == pytest.approx(0.5)


@pytest.mark.parametrize("teacher", [0.8, 0.7])
def test_no_gap_to_recover(teacher):
    _, kd = summarise(runs_of({"none": [0.8, 0.8], "kd": [0.9, 0.9]}, teacher), ["none", "kd"])
    assert kd.gap_recovered is None


def test_without_runs_alone_nothing_is_compared():
    (entry,) = summarise(runs_of({"kd": [0.5, 0.6]}), ["kd"])
    assert entry.difference is None
    assert entry.gap_recovered is None
    assert entry.value.mean == pytest.approx(0.55)
    (entry, _) = summarise(runs_of({"kd": [0.5, 0.6], "none": [0.5]}), ["kd", "none"])
    assert entry.difference is None


def test_means_in_the_unit_of_their_metric():
    share, other = Metric("top1", "top-1"), Metric("loss", "loss", higher_is_better=False, share=False)
    assert (Mean(0.5, 0.0123).shown(share), Mean(0.5, None).shown(share, "+")) == ("50.00 ± 1.23", "+50.00")
    assert Mean(0.5, 0.0123).shown(other, "+") == "+0.5 ± 0.0123"


@pytest.mark.parametrize(
    "values", [[0.01, 0.03, -0.01, 0.02], [-0.02, 0.01, -0.04], [0.01, 0.012], [0.5, -0.1, 0.2, 0.3, 0.1]]
)
def test_the_number_of_seeds_by_a_search_of_every_interval(values):
    mean, deviation, count = np.mean(values), np.std(values, ddof=1), 3
    while not abs(mean) - stats.t.interval(0.95, count - 1, 0, deviation / count**0.5)[1] > 0:
        count += 1
    assert seeds_needed(Mean.of(values), len(values)) == count


def test_so_many_seeds_tell_it_in_half_of_the_experiments():
    # With the variance as it is, the interval of the needed number ends near zero: about half of them leave zero out.
    mean, deviation = 0.01, 0.02
    values = np.array([-1.0, 0.0, 1.0]) * deviation + mean
    count = seeds_needed(Mean.of(list(values)), 3)
    drawn = np.random.default_rng(0).normal(mean, deviation, (4000, count))
    half = stats.t.ppf(0.975, count - 1) * drawn.std(1, ddof=1) / count**0.5
    assert 0.4 < np.mean(np.abs(drawn.mean(1)) > half) < 0.65


def test_what_cannot_be_told_in_words():
    top1, loss = Metric("top1", "top-1"), Metric("loss", "loss", higher_is_better=False, share=False)
    assert conclusion(Mean.of([0.4]), 1, top1) == "one seed tells no difference; at least 3 would"
    assert conclusion(Mean.of([0.02, 0.03]), 2, top1).startswith("two seeds tell no difference; about ")
    assert (
        conclusion(Mean.of([0.01, -0.01, 0.0]), 3, top1)
        == f"no difference can be told; more than {MOST} seeds would be needed"
    )
    assert conclusion(Mean.of([0.02, 0.03, 0.02]), 3, top1) == "better than without a teacher"
    assert conclusion(Mean.of([-0.02, -0.03, -0.02]), 3, top1) == "worse than without a teacher"
    assert conclusion(Mean.of([-0.02, -0.03, -0.02]), 3, loss) == "better than without a teacher"
    assert seeds_needed(Mean.of([0.02, 0.02]), 2) == 3  # equal by chance: still three


def test_no_share_of_the_gap_where_no_difference_is_told():
    top1 = Metric("top1", "top-1")
    for guided, shown in (([0.9, 0.5], ""), ([0.6, 0.61, 0.62], "23%")):
        _, entry = summarise(runs_of({"none": [0.5, 0.52, 0.51][: len(guided)], "kd": guided}), ["none", "kd"])
        assert entry.cells(top1)[2] == shown


def test_the_student_alone_in_words():
    guided, alone = run_of("kd", 0, {"top1": 0.7}), run_of("none", 0, {"top1": 0.65})
    assert alone_in_words(guided, None, "COMMAND") == "student alone: not known (COMMAND trains it)"
    told = alone_in_words(guided, alone, "COMMAND")
    assert told.startswith("student alone: top-1 65.00%, distilled 70.00%, +5.00: one seed tells no difference")
