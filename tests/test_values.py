import pytest
import yaml
from jsonargparse import ArgumentParser

from matchdistill.values import LONGEST, MOST, OPTIONS, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 30)
)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, 2.5, null, true]\nc: {d: e}",
        "shared: &s {lr: 0.1}\nfirst: *s\nsecond: {<<: *s, epochs: 3}",
        b"\xef\xbb\xbfa: \xc3\xa9",
        "a: \xe9".encode("utf-16"),
        "",
        "3",
        "[" * 20 + "]" * 20,
        f"a: [{', '.join('x' * (MOST - 10))}]",
    ],
)
def test_plain_values_are_read_as_they_are(text):
    assert read_yaml(text) == yaml.safe_load(text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "the mapping in line 1 has the key 'a' twice"),
        ("a:\n  b: 1\n  'b': 2", "the mapping in line 2 has the key 'b' twice"),
        ("- {a: 1}\n- {c: 1, c: 1}", "the mapping in line 2 has the key 'c' twice"),
        (BOMB, f"more than {MOST} values"),
        ("c: 1\na: &a {b: *a}", "the mapping in line 2 contains itself through an alias"),
        ("&a [1, [*a]]", "contains itself through an alias"),
        ("[" * 100_000, "nested too deeply"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("x" * (LONGEST + 1), f"more than {LONGEST}"),
        ("a: 2026-01-01", "it has a date"),
        ("a: !!binary aGk=", "it has a bytes"),
        ("a: !!set {x, y}", "it has a set"),
        ("a: !!timestamp x", ""),
        ("a: " + "9" * 10_000, "digits"),
        ("{[a]: b}", "unhashable"),
        ("a: 1\n---\nb: 2", "single document"),
        (b"\xff\xfe\x00", ""),
    ],
)
def test_what_is_doubtful_or_endless_is_refused_at_once(text, said):
    with pytest.raises(ValueError) as info:
        read_yaml(text)
    assert said in str(info.value)
    assert "\n" not in str(info.value)


def test_options_are_read_by_the_same_rules():
    parser = ArgumentParser(exit_on_error=False, parser_mode=OPTIONS)
    parser.add_argument("--name", type=str)
    parser.add_argument("--values", type=dict)
    parser.add_argument("--rate", type=float)
    parsed = parser.parse_args(["--name=caf\udce9: [", "--values={a: 1e-3}", "--rate=1e-3"])
    assert (parsed.name, parsed["values"], parsed.rate) == ("caf\udce9: [", {"a": 0.001}, 0.001)
    for value, said in (("{a: 1, a: 2}", "'a' twice"), ("{a: &a [*a]}", "itself"), ("[" * 5000, "deeply")):
        with pytest.raises(Exception, match=said):
            parser.parse_args([f"--values={value}"])
