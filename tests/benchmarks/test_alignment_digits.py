"""What the benchmark on small sets of digits makes of images, of its runs, and of what ran before.

Axes: N images, H height, W width.
"""

import contextlib
import gzip

import numpy as np
import pytest
import torch

from benchmarks import alignment_digits
from matchdistill.aligned import AlignedPosition
from matchdistill.files import read_json
from matchdistill.runs.metrics import RunMetrics
from matchdistill.runs.recipe import Recipe, load_recipe


def test_every_method_and_set_is_a_recipe() -> None:
    config = load_recipe("quickstart").config
    for _, data in alignment_digits.SETS.values():
        for changes in alignment_digits.METHODS.values():
            recipe = Recipe.of(config, **data, **{f"distillation__{key}": value for key, value in changes.items()})
            assert recipe.distillation.method == changes["method"]
            assert recipe.data.options.train_limit == 300


def test_digits_are_read_from_a_table(tmp_path) -> None:
    rows = np.arange(3 * 17).reshape(3, 17)
    rows[:, -1] = 7, 0, 3
    with gzip.open(tmp_path / "digits.csv.gz", "wt") as file:
        np.savetxt(file, rows, delimiter=",", fmt="%d")
    pixels, labels = alignment_digits.read_digits(tmp_path / "digits.csv.gz")
    assert labels.tolist() == [7, 0, 3]
    np.testing.assert_array_equal(pixels.numpy(), rows[:, :-1].reshape(3, 4, 4))


def test_the_first_images_of_each_digit_are_for_training(monkeypatch) -> None:
    monkeypatch.setattr(alignment_digits, "TRAINING", 2)
    labels = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1])
    pixels = torch.arange(8.0)[:, None, None].expand(-1, 28, 28)  # the image's number everywhere
    train, test, names = alignment_digits.parted(pixels, labels)
    assert len(names) == 10
    assert (train.tensors[1].tolist(), test.tensors[1].tolist()) == ([1, 0, 1, 0], [1, 0, 0, 1])
    first, second = (each.tensors[0][:, 0, 0, 0] for each in (train, test))
    assert train.tensors[0].shape == (4, 3, 16, 16)
    assert float(train.tensors[0].mean()) == pytest.approx(0, abs=1e-6)
    assert float(train.tensors[0].std()) == pytest.approx(1, abs=1e-5)
    ranks = torch.cat([first, second]).argsort().tolist()
    assert [[0, 1, 2, 4, 3, 5, 6, 7][rank] for rank in ranks] == list(range(8))


def test_a_studied_row_leaves_the_library_as_it_was() -> None:
    original = dict(vars(AlignedPosition))
    for method in alignment_digits.METHODS:
        with contextlib.suppress(KeyError), alignment_digits.patched(method):
            assert (dict(vars(AlignedPosition)) == original) == (method not in alignment_digits.STUDIED)
            raise KeyError
        assert dict(vars(AlignedPosition)) == original


def test_differences_are_paired_by_seed_and_runs_add_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(alignment_digits, "RESULTS", tmp_path)
    base = {"none": 0.7, "mgd-align": 0.8, "ofd": 0.9}

    def fit(recipe, folder, **options):
        if folder.name != "teacher":
            assert recipe.training.epochs == int(folder.parts[-3])
        found = {"top1": base[recipe.distillation.method] + recipe.seed / 100}
        return RunMetrics("classification", "x", recipe.seed, 7, found, {"top1": 0.95}, {}, [], 1.0)

    monkeypatch.setattr(alignment_digits, "fit", fit)
    monkeypatch.setattr(Recipe, "with_trained_teacher", lambda self, weights: self)
    best = alignment_digits.BASE
    alignment_digits.run(tmp_path, 3, ["digits"], [best, "alone"])
    alignment_digits.run(tmp_path, 2, ["digits"], ["ofd"])
    alignment_digits.run(tmp_path, 2, ["digits"], ["ofd"], epochs=160)
    found = read_json(tmp_path / "alignment_digits.json")["digits"]
    assert found["40"]["top1"] == {
        "alone": {"0": 0.7, "1": 0.71, "2": 0.72},
        best: {"0": 0.8, "1": 0.81, "2": 0.8200000000000001},
        "ofd": {"0": 0.9, "1": 0.91},
    }
    assert list(found["160"]["top1"]) == ["ofd"]
    lines = (tmp_path / "alignment_digits.md").read_text().splitlines()
    assert f"| {best} | 3 | 81.00 ± 2.48 | +10.00 ± 0.00 |  |" in lines
    assert "| alone | 3 | 71.00 ± 2.48 |  | +10.00 ± 0.00 |" in lines
    assert "| ofd | 2 | 90.50 ± 6.35 | +20.00 ± 0.00 | -10.00 ± 0.00 |" in lines
    assert lines.count("Teacher: 95.00.") == 2
