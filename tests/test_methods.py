import pytest

from matchdistill.methods import METHODS, default_weights, method_names, parse_method
from matchdistill.reduction import REDUCTIONS


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


def test_every_method_says_what_is_learned():
    for name, method in method_names().items():
        assert parse_method(name) == method
        assert method.learned.startswith("from labels")
        assert ("its output" in method.learned) == method.kd
        assert "{" not in method.learned
    assert parse_method("mgd-rd+kd").learned.endswith("(channels matched, reduced by `rd`) and its output")


def test_matched_methods_alone_have_reductions():
    for name, family in METHODS.items():
        own = [method for method, parsed in method_names().items() if parsed.features == name]
        assert len(own) == 2 * (len(REDUCTIONS) if family.takes_reduction else 1)
        assert (family.position is None) == (family.matcher is not None)


def test_weights_of_controls_are_those_of_what_they_control():
    assert set(default_weights()) == set(METHODS) - {"random"} | {"kd"}
