import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from matchdistill.tasks import neighbours
from matchdistill.tasks.neighbours import Separation, neighbour_classes, probed_classes


@pytest.fixture(scope="module")
def digits():
    """Features and labels of a bank of 300, and of 200 images."""
    found = load_digits()
    features, labels = torch.from_numpy(found.data).float() + 0.5, torch.from_numpy(found.target)
    return features[:300], labels[:300], features[300:500], labels[300:500]


@pytest.mark.parametrize("chunk", [7, 1024])
def test_neighbours_are_those_of_scikit_learn(digits, monkeypatch, chunk):
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    bank, bank_labels, features, _ = digits
    expected = KNeighborsClassifier(20, metric="cosine").fit(bank.numpy(), bank_labels.numpy())
    classes, counts = neighbour_classes(bank, bank_labels, features)
    assert classes.tolist() == expected.predict(features.numpy()).tolist()
    shares = expected.predict_proba(features.numpy()).max(1)
    torch.testing.assert_close(counts / 20, torch.from_numpy(shares).float())


def test_the_probe_learns_from_the_bank_alone(digits):
    bank, bank_labels, features, labels = digits
    scaler = StandardScaler().fit(bank.numpy())
    expected = LogisticRegression(max_iter=1000).fit(scaler.transform(bank.numpy()), bank_labels.numpy())
    found = probed_classes(bank, bank_labels, features)
    assert (found == torch.from_numpy(expected.predict(scaler.transform(features.numpy())))).float().mean() > 0.99
    assert (found == labels).float().mean() > 0.8


def test_a_bank_of_one_class(digits):
    bank, _, features, _ = digits
    ones = torch.ones(300, dtype=torch.int64)
    assert probed_classes(bank, ones, features).tolist() == [1] * 200
    assert neighbour_classes(bank[:5], ones[:5], features)[1].tolist() == [5] * 200  # of 20 there are 5


def test_batches_add_up(digits):
    bank, bank_labels, features, labels = digits
    whole, parts = Separation(), Separation()
    whole.probing = True
    whole.update(bank, bank_labels, bank=True)
    whole.update(features, labels)
    for own, theirs, is_bank in ((bank, bank_labels, True), (features, labels, False)):
        for x, y in zip(own.split(90), theirs.split(90), strict=True):
            parts.update(x, y, bank=is_bank)
    found = whole.compute()
    assert found.keys() == {"knn", "probe"}
    assert parts.compute() == {"knn": found["knn"]}
    assert found["knn"] == (neighbour_classes(bank, bank_labels, features)[0] == labels).float().mean()
