"""The loss on labels, held to sums over images and classes, one by one."""

import math

import numpy as np
import pytest
import torch

from matchdistill.runs.training import Training
from matchdistill.tasks.classification.labels import LabelLoss

LABELS = torch.tensor([0, 2, 2, 1, 0, 2])
LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def shares_by_hand(labels, smoothing, classes=3):
    return [[(1 - smoothing) * (label == each) + smoothing / classes for each in range(classes)] for label in labels]


def ce_by_hand(logits, shares):
    total = 0.0
    for row, wanted in zip(logits.tolist(), shares, strict=True):
        norm = math.log(sum(math.exp(value) for value in row))
        total -= sum(share * (value - norm) for value, share in zip(row, wanted, strict=True))
    return total / len(logits)


def bce_by_hand(logits, shares, weights=(1, 1, 1)):
    total = 0.0
    for row, wanted in zip(logits.tolist(), shares, strict=True):
        for value, share, weight in zip(row, wanted, weights, strict=True):
            yes = 1 / (1 + math.exp(-value))
            total -= weight * (share * math.log(yes) + (1 - share) * math.log(1 - yes))
    return total / logits.numel()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("kind", "by_hand"), [("ce", ce_by_hand), ("bce", bce_by_hand)])
def test_labels_and_shares(kind, by_hand, smoothing):
    loss = LabelLoss(Training(loss=kind, label_smoothing=smoothing), 3)
    expected = by_hand(LOGITS, shares_by_hand(LABELS.tolist(), smoothing))
    assert float(loss(LOGITS, LABELS)) == pytest.approx(expected)
    shares = torch.rand(6, 3, dtype=torch.float64)
    assert float(loss(LOGITS, shares)) == pytest.approx(by_hand(LOGITS, shares.tolist()))  # these are smoothed already


def test_weights_of_classes():
    logits, weights = LOGITS.float(), [0.5, 2.0, 1.0]
    costs = [ce_by_hand(LOGITS[[row]], shares_by_hand([label], 0)) for row, label in enumerate(LABELS.tolist())]
    own = [weights[label] for label in LABELS.tolist()]
    expected = sum(weight * cost for weight, cost in zip(own, costs, strict=True)) / sum(own)
    assert float(LabelLoss(Training(class_weights=weights), 3)(logits, LABELS)) == pytest.approx(expected, rel=1e-5)
    loss = LabelLoss(Training(class_weights=weights, loss="bce"), 3)
    expected = bce_by_hand(LOGITS, shares_by_hand(LABELS.tolist(), 0), weights)
    assert float(loss(logits, LABELS)) == pytest.approx(expected, rel=1e-5)
    balanced = LabelLoss(Training(class_weights="balanced"), 4, LABELS).weights  # nothing is of the last class
    assert balanced.tolist() == pytest.approx([6 / (4 * 2), 6 / (4 * 1), 6 / (4 * 3), 6 / 4])
    with pytest.raises(ValueError, match=r"training.class_weights has 3 numbers for 10 classes: give one for each"):
        LabelLoss(Training(class_weights=weights), 10)


@pytest.mark.parametrize("count", [6, 5, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_mixup(count, smoothing):
    """Which share was drawn follows from the targets: everything else from the share."""
    loss = LabelLoss(Training(mixup=0.7, label_smoothing=smoothing), 3)
    images, labels = torch.rand(count, 3, 4, 4), LABELS[:count]
    seen = set()
    for seed in range(5):
        np.random.seed(seed)
        mixed, targets = loss.mixed(images.clone(), labels)
        np.random.seed(seed)
        np.random.rand()
        share = np.random.beta(0.7, 0.7)
        seen.add(round(share, 6))
        even = count // 2 * 2
        smooth = shares_by_hand(labels.tolist(), smoothing)
        for row in range(count):
            other, own = (even - 1 - row, share) if row < even else (row, 1.0)
            torch.testing.assert_close(mixed[row], own * images[row] + (1 - own) * images[other])
            wanted = [own * a + (1 - own) * b for a, b in zip(smooth[row], smooth[other], strict=True)]
            assert targets[row].tolist() == pytest.approx(wanted, abs=1e-6)
    assert len(seen) == 5


def test_cutmix():
    loss = LabelLoss(Training(cutmix=1.0), 3)
    images, labels = torch.arange(6.0)[:, None, None, None].expand(6, 3, 8, 8).clone(), LABELS
    cut = 0
    for seed in range(8):
        np.random.seed(seed)
        mixed, targets = loss.mixed(images.clone(), labels)
        for row in range(6):
            own, other = (mixed[row] == row), (mixed[row] == 5 - row)
            assert (own ^ other).all()
            share = own.float().mean()
            cut += 0 < share < 1
            expected = [share * (labels[row] == each) + (1 - share) * (labels[5 - row] == each) for each in range(3)]
            assert targets[row].tolist() == pytest.approx([float(each) for each in expected], abs=1e-6)
    assert cut > 20


def test_nothing_is_mixed_by_default():
    loss, images = LabelLoss(Training(), 3), torch.rand(6, 3, 4, 4)
    assert loss.mixed(images, LABELS) == (images, LABELS)
    assert list(loss.state_dict()) == []
