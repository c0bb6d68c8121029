"""Shares of variance against scikit-learn's regression."""

import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from matchdistill.distiller import MatchingDistiller
from networks import PLAIN_TAPS, Plain, as_if_trained
from scripts import script

explained = script("explained")


def test_shares_of_variance(monkeypatch):
    monkeypatch.setattr(explained, "RIDGE", 1e-12)
    torch.manual_seed(0)
    distiller = MatchingDistiller(as_if_trained(Plain(4)), as_if_trained(Plain(4)), PLAIN_TAPS)
    train, test = torch.randn(30, 3, 8, 8), torch.randn(20, 3, 8, 8)
    distiller.refresh([train])
    samples = []
    for images in (train, test):
        distiller.student.eval()
        with distiller.capture() as captured:
            distiller.student(images)
        pairs = [(captured.values[number], distiller._teacher(captured)[number]) for number in range(3)]
        samples.append([[v.movedim(1, -1).flatten(0, -2).detach().double().numpy() for v in pair] for pair in pairs])
    batches = [[(images[:12], None), (images[12:], None)] for images in (train, test)]
    moments = [explained.moments(distiller, each) for each in batches]
    for number, position in enumerate(distiller.positions):
        (student, teacher), (held_out, target) = (each[number] for each in samples)
        fitted, measured = (each[number] for each in moments)
        whole = LinearRegression().fit(student, teacher).predict(held_out)
        weights = explained.of_all(fitted, position.student_channels)
        expected = r2_score(target, whole, multioutput="variance_weighted")
        assert explained.explained(weights, measured) == pytest.approx(expected, abs=1e-6)
        alone = target.copy()
        for own, other in enumerate(position.index[:, 0].tolist()):
            fit = LinearRegression().fit(student[:, [own]], teacher[:, other])
            alone[:, other] = fit.predict(held_out[:, [own]])
        weights = explained.one_to_one(fitted, position.index[:, 0])
        expected = r2_score(target, alone, multioutput="variance_weighted")
        assert explained.explained(weights, measured) == pytest.approx(expected, abs=1e-9)
