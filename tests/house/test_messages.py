"""One catalogue: both languages have every key and the same fields; every `say` in the source is in it."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import pellucid
from pellucid import messages
from pellucid.cli.usage import CHINESE

PACKAGE = Path(pellucid.__file__).parent


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "_language", ["en"])


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "CATALOGUE", dict(messages.CATALOGUE))


def calls_of(function: str) -> list[tuple[str, str, set[str] | None]]:
    """(file, key, fields) of every `function("key", field=...)` in the package; fields None where `**` hides them."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == function:
                if node.args and isinstance(node.args[0], ast.Constant):
                    names = {k.arg for k in node.keywords}
                    found.append((path.name, node.args[0].value, None if None in names else names))
    return found


def test_every_said_key_is_in_the_catalogue_with_its_fields():
    for info in pkgutil.walk_packages([str(PACKAGE)], "pellucid."):  # rooms add their own sentences when imported
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    calls = calls_of("say")
    assert len(calls) > 20
    for file, key, names in calls:
        assert key in messages.CATALOGUE, f"{file} says {key!r}"
        assert names is None or names == messages.fields(messages.CATALOGUE[key].en), f"{file}: fields of {key!r}"


def test_every_error_in_parts_is_in_the_catalogue_with_its_fields():
    calls = calls_of("three_parts")
    assert len(calls) > 15
    for file, key, names in calls:
        known = [messages.CATALOGUE[k].en for k in (key, f"{key}.why", f"{key}.next") if k in messages.CATALOGUE]
        assert key in messages.CATALOGUE, f"{file} tells {key!r}"
        assert names == set().union(*map(messages.fields, known)), f"{file}: fields of {key!r}"


def test_parts_and_terms(scratch: None):
    messages.add({"t.e": ("no {x}", "没有 {x}"), "t.e.next": ("give {y}", "给 {y}"), "term.t/rate": ("t/rate", "速率")})
    assert messages.three_parts("t.e", x=1, y=2) == ("no 1", "", "give 2")
    for wrong in ({"x": 1}, {"x": 1, "y": 2, "z": 3}):
        with pytest.raises(KeyError):
            messages.three_parts("t.e", **wrong)
    with pytest.raises(KeyError):
        messages.three_parts("t.none")
    assert (messages.term("t/rate"), messages.term("unheard of")) == ("t/rate", "unheard of")
    messages.set_language("zh")
    assert messages.three_parts("t.e", x=1, y=2) == ("没有 1", "", "给 2")
    assert messages.both("t.e", x=1) == ("no 1", "没有 1")
    assert (messages.term("t/rate"), messages.term("unheard of")) == ("速率", "unheard of")


def test_both_languages_have_the_same_fields_and_are_what_they_say():
    for key, text in messages.CATALOGUE.items():
        assert messages.fields(text.en) == messages.fields(text.zh), key
        assert text.en and text.zh and not CHINESE.search(text.en), key


def test_say_in_both_languages():
    assert messages.say("display.left", time="5s") == "left 5s"
    messages.set_language("zh")
    assert messages.say("display.left", time="5s") == "剩余 5s"


@pytest.mark.parametrize(("key", "values"), [
    ("no.such.key", {}), ("display.left", {}), ("display.left", {"time": 1, "colour": 2}), ("display.left", {"tme": 1}),
])
def test_a_missing_key_or_field_is_an_error(key: str, values: dict):
    with pytest.raises(KeyError):
        messages.say(key, **values)


def test_add_refuses_other_words_and_unlike_fields(scratch: None):
    messages.add({"t.a": ("one {x}", "一 {x}")})
    messages.add({"t.a": ("one {x}", "一 {x}")})
    with pytest.raises(ValueError, match="other words"):
        messages.add({"t.a": ("two {x}", "一 {x}")})
    with pytest.raises(ValueError, match="fields"):
        messages.add({"t.b": ("one {x}", "一 {y}")})
    assert "t.b" not in messages.CATALOGUE


@pytest.mark.parametrize(("environment", "language"), [
    ({"LANG": "zh_CN.UTF-8"}, "zh"), ({"LANG": "en_US.UTF-8"}, "en"), ({"LC_ALL": "C.UTF-8", "LANG": "zh_CN"}, "en"),
    ({"LC_MESSAGES": "zh_TW.UTF-8", "LANG": "en_US"}, "zh"), ({"LC_ALL": "", "LANG": "zh_CN"}, "zh"),
])
def test_default_language_follows_the_locale(monkeypatch, environment: dict[str, str], language: str):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert messages.default_language() == language


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="zh, en"):
        messages.set_language("fr")
