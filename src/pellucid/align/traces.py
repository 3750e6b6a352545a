"""Rejection sampling: a teacher answers problems several times, a grader keeps the right answers, and they are the data.

    summary = collect(teacher, task, "traces.jsonl", TraceConfig(problems=500, samples=4, keep=2))
    pellucid train sft STUDENT traces.jsonl          # sequence-level distillation: the file is ordinary chat data

Every line is {"messages": [user, assistant], ...} with the task, the problem's number and key, and the teacher's name. Only
answers that the grader calls correct are kept, equal ones once, at most `keep` of a problem. Problems are those of the
training side of the split. Beside the file, FILE.progress.json says how far it is; a killed run goes on from there, and ends
with the same file as one that was not killed.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pellucid import events
from pellucid.align.prompts import content_of
from pellucid.align.teachers import Teacher, check_single_turn
from pellucid.errors import BadInput
from pellucid.files import write_atomic
from pellucid.tasks import Completion, Problem, Task, finished_only
from pellucid.tasks.evaluate import distinct_problems, grade
from pellucid.tokenizers import Tokenizer

Verify = Callable[[Problem, Completion], dict[str, float]]


@dataclass(frozen=True)
class TraceConfig:
    """How many problems, and how many answers of each."""

    problems: int = 200
    """Different problems that are asked."""
    samples: int = 4
    """Answers to each."""
    keep: int = 2
    """Most right answers kept of each, the first ones sampled."""
    temperature: float = 0.8
    """Of the teacher's samples."""
    batch: int = 32
    """Problems asked at once; after each batch the progress is saved."""
    on: str = "correct"
    """The component of the grade that must be 1."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.problems, self.samples, self.keep, self.batch) < 1:
            raise BadInput("problems, samples, keep and batch are at least 1", next="change the one that is not")
        if self.temperature < 0 or (self.temperature == 0 and self.samples > 1):
            raise BadInput(f"{self.samples} samples at temperature {self.temperature:g} make no sense",
                           "greedy answers are all the same", "use samples=1, or a temperature above 0")


@dataclass
class TracesMade(events.Event):
    """How far the collection of traces is."""

    kind = "traces"
    problems: int  # asked so far
    of: int
    answers: int
    correct: int
    duplicates: int  # right, and equal to one that is kept
    kept: int
    solved: int  # problems with at least one right answer
    tokens: int


@dataclass
class _Progress:
    done: int = 0
    answers: int = 0
    correct: int = 0
    duplicates: int = 0
    kept: int = 0
    solved: int = 0
    tokens: int = 0


def collect(teacher: Teacher, task: Task, file: str | Path, config: TraceConfig, *, resume: bool = False,
            verify: Verify | None = None) -> TracesMade:
    """Writes the file, batch by batch, and says what it holds. verify: components of an answer; by default the task's grade.

    Errors: BadInput where the file exists and `resume` is not asked for, or belongs to other settings.
    """
    file, began = Path(file), time.monotonic()
    settings = {"teacher": teacher.name, "task": task.name, **asdict(config)}
    progress = _begin(file, settings, resume)
    judge = verify or (lambda problem, said: finished_only(grade(task, problem, said), said.finished))
    problems = distinct_problems(task, config.problems, random.Random(config.seed), "train")
    check_single_turn(task, problems[0])
    while progress.done < len(problems):
        at = progress.done
        part = problems[at : at + config.batch]
        said = teacher.answer(part, config.samples, config.temperature, (config.seed << 32) + at * config.samples)
        lines = []
        for number, (problem, answers) in enumerate(zip(part, said), at):
            lines += [_line(problem, number, text, teacher.name) for text in _kept(problem, answers, judge, config, progress)]
        progress.done += len(part)
        _append(file, lines)
        _save(file, progress, settings)
        events.emit(_told(progress, config))
    if not progress.kept:
        raise BadInput(f"no answer of {teacher.name} to {config.problems} problems was right", f"{progress.answers} answers were graded",
                       "choose a better teacher or easier problems; look at some of its answers first")
    made = _told(progress, config)
    events.note(f"traces: {made.kept} kept of {made.answers} answers ({made.correct} right, {made.duplicates} of them duplicates) "
                f"to {made.problems} problems, {made.solved} of them solved, in {time.monotonic() - began:.0f} s; {file}")
    return made


def _kept(problem: Problem, answers: list[Completion], judge: Verify, config: TraceConfig, progress: _Progress) -> list[str]:
    found: dict[str, str] = {}  # without its spaces -> the answer
    right = 0
    for said in answers:
        progress.answers, progress.tokens = progress.answers + 1, progress.tokens + said.tokens
        if judge(problem, said).get(config.on, 0.0) < 1.0:
            continue
        right += 1
        key = " ".join(said.text.split())
        if key in found:
            progress.duplicates += 1
        found.setdefault(key, said.text)
    texts = list(found.values())[: config.keep]
    progress.correct, progress.solved, progress.kept = progress.correct + right, progress.solved + (right > 0), progress.kept + len(texts)
    return texts


def _line(problem: Problem, number: int, text: str, teacher: str) -> str:
    content = content_of(problem)
    before = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
    record = {"messages": [*before, {"role": "assistant", "content": text}], "task": problem.task, "problem": number,
              "key": problem.key, "teacher": teacher}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _told(p: _Progress, config: TraceConfig) -> TracesMade:
    return TracesMade(p.done, config.problems, p.answers, p.correct, p.duplicates, p.kept, p.solved, p.tokens)


# --- the file and how far it is -----------------------------------------------------------------------------------------


def progress_file(file: Path) -> Path:
    return file.with_name(file.name + ".progress.json")


def _begin(file: Path, settings: dict[str, Any], resume: bool) -> _Progress:
    known = progress_file(file)
    if not resume or not known.exists():
        if file.exists() and file.stat().st_size and not resume:
            raise BadInput(f"{file} exists", "it would be written over", "go on with it (--resume), or name another file")
        write_atomic(file, b"")
        progress = _Progress()
        _save(file, progress, settings)
        return progress
    saved = json.loads(known.read_text(encoding="utf-8"))
    other = [k for k, v in settings.items() if saved["settings"].get(k) != v]
    if other:
        raise BadInput(f"{file} was begun with other settings", ", ".join(
            f"{k}: {saved['settings'].get(k)!r}, now {settings[k]!r}" for k in other), "use the same ones, or another file")
    progress = _Progress(**saved["progress"])
    _trim(file, progress.done)
    return progress


def _trim(file: Path, done: int) -> None:
    """Whole lines of problems that are done; what an interrupted batch wrote is made again."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []:
        try:
            if json.loads(line)["problem"] < done and line.endswith("\n"):
                kept.append(line)
        except ValueError:
            break  # the torn end
    write_atomic(file, "".join(kept))


def _append(file: Path, lines: list[str]) -> None:
    with file.open("a", encoding="utf-8") as f:
        f.writelines(lines)
        f.flush()
        os.fsync(f.fileno())


def _save(file: Path, progress: _Progress, settings: dict[str, Any]) -> None:
    write_atomic(progress_file(file), json.dumps({"progress": asdict(progress), "settings": settings}, ensure_ascii=False, indent=1) + "\n")


def check_template(tokenizer: Tokenizer, file: str | Path) -> None:
    """The student's chat template must keep what the trace thinks. Some (DeepSeek R1's) drop it from earlier answers, and a
    model trained on them never sees a trace. Errors: BadInput."""
    from pellucid.data.chats import read_chats

    chat = next(iter(read_chats(file)))
    ids, mask = tokenizer.encode_chat(chat.messages, tools=chat.tools)
    learned = tokenizer.decode([i for i, on in zip(ids, mask) if on])
    thought = chat.messages[-1]["content"].partition("</think>")[0].removeprefix("<think>").strip()
    if "</think>" in chat.messages[-1]["content"] and thought not in learned:
        raise BadInput("the student's chat template drops the thought of an answer", "a trace would be learned without its reasoning",
                       "give the student a template that keeps it (chat_template.jinja in its folder)")
