import pytest
import yaml

from wan_dist.config.yaml_text import YamlSyntaxError, dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("10", 10),
        ("010", 10),
        ("0x1F", 31),
        ("true", True),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("12:30:00", "12:30:00"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        (".inf", ".inf"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("[1, a, 2.5]", [1, "a", 2.5]),
    ],
)
def test_plain_values_follow_yaml_1_2(text: str, value: object):
    found = parse_yaml(f"key: {text}").value["key"]
    assert found == value
    assert type(found) is type(value)


def test_lines_name_each_key_and_item():
    document = parse_yaml("a:\n  b: 1\n  c:\n    - x\n    - y\n")
    assert document.lines[("a", "b")] == 2
    assert document.lines[("a", "c", 1)] == 5


def test_duplicate_keys_are_reported_at_every_depth():
    document = parse_yaml("a:\n  b: 1\n  b: 2\nc: 3\nc: 4\n")
    assert [problem.text for problem in document.problems] == [
        "a.b is set twice, in lines 2 and 3; keep one.",
        "c is set twice, in lines 4 and 5; keep one.",
    ]
    assert document.value == {"a": {"b": 1}, "c": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system [ls]", None),
        ("a: !!python/name:os.system x", "only plain values are read"),
        ("1: x", "'1' in line 1 is not text"),
        ("? [a]\n: x", "'a list or mapping' in line 1 is not text"),
        ("a: &x [*x]", "contains itself"),
        ("a: !!int seven", "does not fit its tag"),
    ],
)
def test_only_plain_data_is_read(text: str, message: str | None):
    document = parse_yaml(text)
    if message is None:  # the tag of a list is ignored: its items stay text, nothing is called
        assert document.value == {"a": ["ls"]}
    else:
        assert message in document.problems[0].text


@pytest.mark.parametrize(("text", "line"), [("a: [1", 1), ("a: 1\n b: 2", 2), ("a:\n\t- 1", 2), ("a: 1\n---\nb: 2", 2)])
def test_syntax_errors_name_the_line(text: str, line: int):
    with pytest.raises(YamlSyntaxError) as caught:
        parse_yaml(text)
    assert caught.value.line is not None
    assert abs(caught.value.line - line) <= 1  # an unclosed bracket is noticed at the end of the text


def test_deep_nesting_is_refused():
    with pytest.raises(YamlSyntaxError, match="nested too deeply"):
        parse_yaml("a: " + "[" * 5000)


def test_dump_is_read_back_by_this_reader_and_by_yaml_1_1():
    value = {
        "text": ["no", "on", "1e-4", "1e5", "0o17", "12:30:00", "2024-01-01", "null", "~", "", "a: b", "# x", "é"],
        "numbers": [1e-5, 1e20, 0.1, 3, -7],
        "nested": {"empty": {}, "flags": [True, False, None], "pairs": [[1, 2], [3, 4]]},
    }
    text = dump_yaml(value)
    assert parse_yaml(text).value == value
    assert yaml.safe_load(text) == value
