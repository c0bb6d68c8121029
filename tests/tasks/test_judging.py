"""What a network makes of images, held to torchmetrics and to slow loops."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_jaccard_index
from torchmetrics.functional.classification import multilabel_average_precision as average_precision

from matchdistill.tasks.classification.judging import ClassJudge
from matchdistill.tasks.detection.judging import BoxJudge, f1_score
from matchdistill.tasks.detection.module import DetectionModule
from matchdistill.tasks.detection.module import average_precision as measure_of_boxes
from matchdistill.tasks.judging import MOST_PAIRS, calibration_error, confidence_bins, confused_pairs
from matchdistill.tasks.multilabel.judging import LabelsJudge
from matchdistill.tasks.segmentation.judging import intersections_over_unions


@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_is_torchmetrics(seed):
    chance = torch.Generator().manual_seed(seed)
    probabilities = (4 * torch.randn(500, 7, generator=chance)).softmax(1)
    labels = torch.randint(7, (500,), generator=chance)
    confidence, found = probabilities.max(1)
    expected = multiclass_calibration_error(probabilities, labels, 7, n_bins=15, norm="l1")
    assert calibration_error(confidence_bins(confidence, found == labels)) == pytest.approx(float(expected), abs=1e-6)


def test_a_network_that_says_how_often_it_is_right_is_calibrated():
    confidence, right = torch.full((100,), 0.75), torch.arange(100) < 75
    assert calibration_error(confidence_bins(confidence, right)) == pytest.approx(0, abs=1e-9)
    assert calibration_error(confidence_bins(torch.ones(10), torch.zeros(10))) == 1
    assert calibration_error(torch.zeros(15, 3, dtype=torch.float64)) == 0


def test_a_classifier_is_judged_image_by_image():
    """In batches, by a loop over images; classes without an image have no accuracy."""
    chance = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 4, generator=chance), torch.randint(3, (50,), generator=chance)
    judge = ClassJudge(4)
    for first in (0, 20, 40):
        judge.add(torch.nn.Identity(), (logits[first : first + 20], labels[first : first + 20]))
    judged = judge.judged()
    counts = {}
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        pair = label, int(np.argmax(row))
        counts[pair] = counts.get(pair, 0) + 1
    assert {(true, found): count for true, found, count in judged.confused.tolist()} == counts
    for label in range(3):
        total = sum(count for (true, _), count in counts.items() if true == label)
        assert judged.classes[label] == pytest.approx(counts.get((label, label), 0) / total)
    assert math.isnan(judged.classes[3])
    assert judged.grade.tolist() == [float(row.argmax() == label) for row, label in zip(logits, labels, strict=True)]
    assert judged.counts.tolist() == [*np.bincount(labels.numpy()), 0]


def test_no_more_pairs_are_kept_than_there_is_room_for():
    pairs = confused_pairs(torch.arange(30_000), torch.zeros(30_000, dtype=torch.int64))
    assert len(pairs) == MOST_PAIRS


def test_boxes_are_graded_by_f1():
    """Two of three objects are found, one of them twice, and one is of the wrong class: 2 * 1 / (3 + 3)."""
    boxes = torch.tensor([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]]).float()
    labels = torch.tensor([1, 2, 1])
    found = torch.tensor([[0, 0, 10, 9], [0, 0, 9, 10], [20, 20, 30, 30]]).float()
    assert f1_score(found, torch.tensor([1, 1, 1]), boxes, labels) == pytest.approx(2 / 6)
    assert f1_score(boxes, labels, boxes, labels) == 1
    assert f1_score(boxes[:0], labels[:0], boxes, labels) == 0
    assert f1_score(boxes, labels, boxes[:0], labels[:0]) == 0
    assert f1_score(boxes[:0], labels[:0], boxes[:0], labels[:0]) == 1


def test_a_detector_is_judged_class_by_class():
    """Class 1 is found, class 2 is not, class 3 has no object, and what is found of an unknown class 9 is left out."""
    boxes = torch.tensor([[0, 0, 10, 10], [20, 20, 40, 40]]).float()
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    found = {"boxes": boxes, "labels": torch.tensor([1, 9]), "scores": torch.tensor([0.9, 0.8])}
    judge = BoxJudge(3, measure_of_boxes(False), 0.3)
    judge.add(lambda images: [found for _ in images], ([torch.zeros(3, 50, 50)] * 2, [target] * 2))
    judged = judge.judged()
    assert judged.classes[:2].tolist() == pytest.approx([1, 0])
    assert math.isnan(judged.classes[2])
    assert judged.counts.tolist() == [2, 2, 0]
    assert judged.grade.tolist() == [0.5, 0.5]
    assert judged.told()["graded"].endswith(
        "score of at least 0.3 count. One is right if it overlaps a true box of its class by an IoU of at least 0.5."
    )


def test_the_judge_of_boxes_does_not_wait_for_other_processes():
    judge = DetectionModule.judge(None, 1)
    judge._measure.distributed_available_fn = lambda: True  # as in a group, whose other processes are elsewhere
    box = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([1])}
    judge.add(lambda images: [{**box, "scores": torch.tensor([0.9])}], ([torch.zeros(3, 9, 9)], [box]))
    assert judge.judged().classes.tolist() == pytest.approx([1])


def test_the_iou_of_classes_is_torchmetrics():
    chance = torch.Generator().manual_seed(1)
    truth, found = torch.randint(4, (2, 500), generator=chance)
    pairs = torch.zeros(4, 4, dtype=torch.int64)
    for true, own in zip(truth.tolist(), found.tolist(), strict=True):
        pairs[true, own] += 1
    expected = multiclass_jaccard_index(found, truth, 4, average=None)
    assert torch.allclose(intersections_over_unions(pairs).float(), expected)


def test_labels_are_judged_class_by_class():
    chance = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(40, 3, generator=chance), torch.randint(2, (40, 3), generator=chance)
    labels[:, 2] = 0
    judge = LabelsJudge()
    judge.add(torch.nn.Identity(), (logits, labels))
    judged = judge.judged()
    expected = average_precision(logits.sigmoid(), labels, 3, average=None)
    assert judged.classes[:2].tolist() == pytest.approx(expected[:2].tolist())
    assert math.isnan(judged.classes[2])
    for grade, row, true in zip(judged.grade.tolist(), logits > 0, labels > 0, strict=True):
        own, other = set(row.nonzero().flatten().tolist()), set(true.nonzero().flatten().tolist())
        assert grade == pytest.approx(len(own & other) / len(own | other) if own | other else 1)
