"""`pellucid VERB TARGET --options` as people and programs meet it: flags, help, errors, exit codes, streams."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import demo_verb
import pytest

import pellucid
from pellucid import __main__ as program
from pellucid import messages
from pellucid.cli import base, failures, usage
from pellucid.cli.base import Common

HERE = Path(__file__).parent
LEAVES = {f"{name} {part}".strip(): leaf for name, verb in program.VERBS.items()
          for part, leaf in (verb.parts or {"": verb}).items()}


@pytest.fixture(autouse=True)
def demo(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(program.VERBS, "demo", program.Verb("demo_verb:demo", "a demonstration", "演示"))
    monkeypatch.setattr(messages, "_language", [])
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    monkeypatch.setenv("COLUMNS", "80")


START = (f"import sys; sys.path.insert(0, {str(HERE)!r})\nfrom pellucid import __main__ as m\n"
         "m.VERBS['demo'] = m.Verb('demo_verb:demo', 'a', 'b')\nsys.exit(m.main())")


def process(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LC_ALL": "C.UTF-8", **environment}
    return subprocess.run([sys.executable, "-c", START, *argv], capture_output=True, text=True, timeout=240, env=env)


# ---- help ---------------------------------------------------------------------------------------------------------

def test_the_first_page_lists_every_verb_in_both_languages(capsys):
    assert program.main(["--help"]) == 0
    english = capsys.readouterr().out
    assert program.main(["--lang", "zh"]) == 0
    chinese = capsys.readouterr().out
    for name, verb in program.VERBS.items():
        assert f"  {name}" in english and verb.en in english and verb.zh in chinese
    assert usage.CHINESE.search(chinese) and not usage.CHINESE.search(english)


def test_version(capsys):
    assert program.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"pellucid {pellucid.__version__}"


def test_waiting_threads_are_bounded_before_any_verb_imports_torch(monkeypatch, capsys):
    happened = []
    monkeypatch.setattr("pellucid.runtime.spin_briefly", lambda: happened.append("bounded"))
    monkeypatch.setattr(program, "dispatch", lambda argv: happened.append("verb") or 0)
    assert program.main(["grow"]) == 0 and happened == ["bounded", "verb"]


def test_the_page_of_a_verb_shows_all_options_once(capsys):
    assert program.main(["demo", "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("pellucid demo MODEL --options\n\nShow what a verb looks like.\n")
    assert "  pellucid demo runs/first --max-steps 3" in page and "Model folder. (required)" in page
    for flag in ("--max-steps INT", "--tasks [TEXT ...]", "--end well|bad", "--no-packing", "--ratio NUMBER", "--json"):
        assert page.count(flag) == 1, flag
    assert "(default: countdown)" in page and "None" not in page and "False" not in page
    assert page.index("--max-steps INT") < page.index("options of every verb") < page.index("--seed")


def test_help_in_chinese_fits_the_terminal_by_display_width(capsys):
    from rich.cells import cell_len

    assert program.main(["demo", "--help", "--lang", "zh"]) == 0
    page = capsys.readouterr().out
    assert "演示一个动词的样子。" in page and "步数。" in page and "How many" not in page
    assert max(map(cell_len, page.splitlines())) <= 80


@pytest.mark.parametrize(("text", "en", "zh"), [
    ("One line.\nand more.\n中文。", "One line. and more.", "中文。"),
    ("中文。\nEnglish.", "English.", "中文。"),
    ("Only English.", "Only English.", "Only English."),
])
def test_lines_are_chosen_by_language(text: str, en: str, zh: str):
    messages.set_language("en")
    assert usage.in_language(text) == en
    messages.set_language("zh")
    assert usage.in_language(text) == zh


# ---- parsing ------------------------------------------------------------------------------------------------------

def test_values_reach_the_config():
    got = base.parse(demo_verb.Demo, ["m/x", "--max_steps", "5", "--tasks", "a", "b", "--end=fail", "--no-packing",
                                      "--ratio", "0.5", "--seed", "3", "--lang", "zh", "--quiet"], "demo")
    assert got == demo_verb.Demo(Path("m/x"), 5, ("a", "b"), "fail", False, 0.5, seed=3, lang="zh", quiet=True)
    assert base.parse(demo_verb.Demo, ["m"], "demo") == demo_verb.Demo(Path("m"))


@pytest.mark.parametrize(("argv", "words"), [
    (["demo", "m", "--max-stepz", "3"], ["--max-stepz", "did you mean --max-steps?"]),
    (["demo", "m", "--max-stepz=3"], ["no option --max-stepz", "did you mean --max-steps?"]),
    (["demo", "m", "--zzzzzz"], ["--zzzzzz", "pellucid demo --help"]),
    (["demo", "m", "--max-steps", "three"], ["--max-steps", "three"]),
    (["demo", "m", "--end", "good"], ["good", "well"]),
    (["demo", "m", "--lang", "fr"], ["fr", "zh"]),
    (["demo", "m", "n"], ["n"]),
    (["demo", "m", "-x"], ["-x"]),
    (["demo"], ["why: it needs MODEL", "pellucid demo --help"]),
    (["demo", "m", "--seed"], ["--seed"]),
    (["demo", "m", "--threads", "0"], ["--threads 0"]),
    (["demo", "m", "--device", "toaster"], ["toaster", "cpu"]),
    (["dmeo"], ["there is no verb dmeo", "did you mean demo?"]),
    (["xyzzy"], ["xyzzy", "pellucid --help"]),
    (["train"], ["pretrain, sft"]),
    (["train", "stf"], ["stf", "did you mean sft?"]),
    (["train", "--json"], ["pretrain, sft"]),
])
def test_bad_arguments_exit_2_and_name_the_nearest(capsys, argv: list[str], words: list[str]):
    assert program.main(argv) == 2
    told = capsys.readouterr()
    assert all(word in told.err for word in words), told.err
    assert told.err.startswith("error: ") and "Traceback" not in told.err and "─" not in told.err
    assert "\x1b" not in told.err


def test_refusals_speak_chinese(capsys):
    assert program.main(["demo", "m", "--max-stepz", "3", "--lang", "zh"]) == 2
    assert "是否想写 --max-steps？" in capsys.readouterr().err
    assert program.main(["--lang=zh", "dmeo"]) == 2
    assert capsys.readouterr().err.startswith("错误: ")


# ---- endings ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("end", "code", "words"), [
    ("well", 0, []),
    ("five", 5, []),
    ("bad", 2, ["error: the model folder is empty", "why: it holds no config.json", "next: pellucid inspect OTHER"]),
    ("fail", 1, ["error: could not write", "why: the disk is full"]),
    ("bug", 1, ["ZeroDivisionError: division by zero\n", "PELLUCID_DEBUG=1"]),
    ("saved", 130, ["step 3 is saved", "--resume"]),
])
def test_exit_codes_and_three_parts(capsys, monkeypatch, end: str, code: int, words: list[str]):
    monkeypatch.delenv("PELLUCID_DEBUG", raising=False)
    assert program.main(["demo", "m", "--end", end, "--threads", "1"]) == code
    told = capsys.readouterr()
    assert told.out == "RESULT m None True\n"
    assert all(word in told.err for word in words) and "Traceback" not in told.err and "second line" not in told.err


def test_the_traceback_is_there_for_those_who_ask(capsys, monkeypatch):
    monkeypatch.setenv("PELLUCID_DEBUG", "1")
    assert program.main(["demo", "m", "--end", "bug", "--threads", "1"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_json_puts_events_and_nothing_else_on_stdout(capsys):
    assert program.main(["demo", "m", "--json", "--end", "bad", "--threads", "1"]) == 2
    told = capsys.readouterr()
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert [e["kind"] for e in lines] == ["note", "stage_begin", "step", "step", "step", "sample", "evaluation",
                                          "stage_end", "note", "error"]
    assert lines[-1]["exit_code"] == 2 and lines[-1]["next"] == "pellucid inspect OTHER"
    assert "RESULT" in told.err and "error: the model folder is empty" in told.err


def test_a_refused_argument_is_an_event_too(capsys):
    assert program.main(["demo", "m", "--json", "--nonsense"]) == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "error"


def test_quiet_shows_results_and_errors_only(capsys):
    assert program.main(["demo", "m", "--quiet", "--end", "fail", "--threads", "1"]) == 1
    told = capsys.readouterr()
    assert told.out == "RESULT m None True\n" and told.err == "error: could not write\n  why: the disk is full\n"


@pytest.mark.parametrize(("argv", "code"), [
    (["--help"], 0), (["--version"], 0), (["demo", "m"], 0), (["demo", "m", "--end", "fail"], 1), (["demo"], 2),
    (["nothing"], 2)])
def test_exit_codes_of_the_process(argv: list[str], code: int):
    done = process(*argv)
    assert done.returncode == code and "\x1b" not in done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_with_130_and_one_line():
    run = subprocess.Popen([sys.executable, "-c", START, "demo", "m", "--end", "wait"], stderr=subprocess.PIPE,
                           stdout=subprocess.DEVNULL, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert run.stderr is not None
    while "waiting" not in run.stderr.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    rest = run.stderr.read()
    assert run.wait(30) == 130 and rest == "error: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("argv", ["--help | true", "demo m --json --max-steps 20000 --threads 1 | head -n 1"])
def test_a_closed_pipe_is_no_error_page(argv: str):
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # where the danger is
    done = subprocess.run(["sh", "-c", f"{shlex.quote(sys.executable)} -c {shlex.quote(START)} {argv}"], env=buffered,
                          capture_output=True, text=True, timeout=240)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr


def test_an_old_terminal_encoding_does_not_end_the_run():
    done = process("--lang", "zh", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "grow" in done.stdout


# ---- every verb ---------------------------------------------------------------------------------------------------

def config_of(leaf: program.Verb) -> type:
    module, name = leaf.target.split(":")
    return base.config_class_of(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", LEAVES)
def test_every_verb_is_there_and_explains_itself(name: str):
    cls = config_of(LEAVES[name])
    assert issubclass(cls, Common) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    texts = {f"the class {cls.__name__}": cls.__doc__ or "", **{o.name: o.help for o in usage.options(cls)}}
    for what, text in texts.items():
        lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("$ ")]
        assert any(usage.CHINESE.search(line) for line in lines), f"{what} has no Chinese help"
        assert any(not usage.CHINESE.search(line) for line in lines), f"{what} has no English help"


@pytest.mark.parametrize("name", LEAVES)
def test_every_example_is_a_command_that_parses(name: str):
    """Kinds of a verb may share one class; then its examples may be for any of them."""
    cls = config_of(LEAVES[name])
    assert usage.examples(cls), "an example, as a line that begins with `$ pellucid`"
    for line in usage.examples(cls):
        program_name, *words = shlex.split(line.split(" | ")[0])
        verb = next(leaf for leaf in LEAVES if words[: len(leaf.split())] == leaf.split())
        assert program_name == "pellucid" and config_of(LEAVES[verb]) is cls
        base.parse(cls, words[len(verb.split()) :], verb)


@pytest.mark.parametrize("name", LEAVES)
def test_every_option_is_read_by_somebody(name: str):
    """An option that nothing reads is a lie. (By name: the field is used as an attribute somewhere in the package.)"""
    source = "\n".join(p.read_text(encoding="utf-8") for p in Path(pellucid.__file__).parent.rglob("*.py"))
    unread = [f.name for f in dataclasses.fields(config_of(LEAVES[name])) if f".{f.name}" not in source]
    assert not unread


# ---- terminals ----------------------------------------------------------------------------------------------------

class Stream:
    def __init__(self, tty: bool):
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


@pytest.fixture
def plain_environment(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch


def test_colour_only_on_a_terminal_that_wants_it(plain_environment):
    assert failures.coloured(Stream(True)) and not failures.coloured(Stream(False))
    plain_environment.setenv("NO_COLOR", "1")
    assert not failures.coloured(Stream(True)) and failures.is_terminal(Stream(True))
    plain_environment.setenv("TERM", "dumb")
    assert not failures.is_terminal(Stream(True))
    told = failures.Failure("a", "b", "c", 1)
    assert failures.three_parts(told, False) == "error: a\n  why: b\n  next: c"
    assert "\x1b[1;31merror:\x1b[0m a" in failures.three_parts(told, True)
