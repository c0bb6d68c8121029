import pytest

from matchdistill.settings import Distillation, Training, parse_method


def test_methods():
    assert parse_method("none") == (None, None, False)
    assert parse_method("kd") == (None, None, True)
    for reduction in ("sm", "rd", "amp", "max", "mean"):
        for features in ("mgd", "random"):
            assert parse_method(f"{features}-{reduction}") == (features, reduction, False)
            assert parse_method(f"{features}-{reduction}+kd") == (features, reduction, True)
    for name in ("fitnets", "at", "ofd"):
        assert parse_method(name) == (name, None, False)
        assert parse_method(f"{name}+kd") == (name, None, True)
    for wrong in ("", "mgd", "random", "amp", "none+kd", "kd+kd", "fitnets-amp", "MGD-AMP"):
        with pytest.raises(ValueError, match="unknown method"):
            parse_method(wrong)
    assert [Distillation(method=method).needs_teacher for method in ("none", "kd", "mgd-rd")] == [False, True, True]


def test_warm_up_is_added():
    assert Training(epochs=120, warmup_epochs=10).all_epochs == 130
