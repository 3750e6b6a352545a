"""`pellucid generate` with a form that the answer must have."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "server"))
from served_models import random_llm

import pellucid
from pellucid.__main__ import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llm = random_llm()
    folder = tmp_path_factory.mktemp("generate") / "model"
    pellucid.save(llm.model, folder, tokenizer=llm.tokenizer)
    return folder


def run(*words: object) -> int:
    return main(list(map(str, words)))


def test_a_regular_expression_and_a_schema(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("generate", folder, "one", "--regex", "[0-9]{3}", "--quiet", "--temperature", "1", "--seed", "3") == 0
    assert re.fullmatch("[0-9]{3}", capsys.readouterr().out.strip())
    (tmp_path / "schema.json").write_text(json.dumps({"enum": ["red", "green"]}))
    assert run("generate", folder, "one", "--json-schema", tmp_path / "schema.json", "--quiet", "--min-p", "0.01", "--repetition-penalty", "1.1") == 0
    assert json.loads(capsys.readouterr().out) in ("red", "green")


@pytest.mark.parametrize(("more", "says"), [(("--regex", "("), "regex"), (("--json-schema", "nowhere.json"), "nowhere.json"), (("--regex", "a", "--json-schema", "SCHEMA"), "exactly one")])
def test_what_is_refused(folder: Path, tmp_path: Path, more: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "schema.json").write_text("{}")
    words = [str(tmp_path / "schema.json") if word == "SCHEMA" else word for word in more]
    assert run("generate", folder, "one", "--quiet", *words) == 2
    assert says in capsys.readouterr().err
