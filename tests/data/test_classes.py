import pytest
import torch

from matchdistill.data.classes import named_classes, split_off, tell_missing


def test_a_share_of_each_class_is_split_off_and_always_the_same():
    labels = torch.arange(3).repeat_interleave(torch.tensor([100, 40, 7]))[torch.randperm(147)]
    train, val = split_off(labels, 0.1)
    assert labels[val].bincount().tolist() == [10, 4, 1]
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(147))
    assert all(torch.equal(*pair) for pair in zip((train, val), split_off(labels, 0.1), strict=True))


def test_a_class_keeps_its_last_image_for_training():
    train, val = split_off(torch.tensor([0, 1, 1, 3]), 0.9)
    assert (len(train), len(val)) == (3, 1)
    with pytest.raises(ValueError, match="each class has only one"):
        split_off(torch.tensor([0, 1, 2]), 0.5)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["b", "a", "10", "9"], ["10", "9", "a", "b"]),
        (["10", "9", "1", "10"], ["1", "9", "10"]),
        (["010", "9"], ["9", "010"]),
    ],
)
def test_order_of_classes(names, order):
    train, val, class_names = named_classes([(name, name) for name in names], None, "x")
    assert (class_names, val) == (order, None)
    assert [class_names[label] for label in train.labels.tolist()] == list(train.paths)


def test_images_of_unknown_classes_and_none():
    with pytest.raises(ValueError, match="x has validation images of classes without training images: b, c"):
        named_classes([("1", "a")], [("2", "a"), ("3", "c"), ("4", "b")], "x")
    with pytest.raises(ValueError, match="x has no training images"):
        named_classes([], [("2", "a")], "x")
    with pytest.raises(ValueError, match="x has no validation images"):
        named_classes([("2", "a")], [], "x")


def test_missing_classes_are_told_with_their_number():
    with pytest.warns(UserWarning, match=r"^x has no images of 12 of 13 classes \(a, b, .*, j and 2 more\): so it is$"):
        tell_missing(torch.tensor([12]), list("abcdefghijklm"), "x", "so it is")
