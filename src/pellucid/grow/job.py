"""The main job: stages in order, each with a held-out number before and after; one folder; exact bookkeeping of time.

Every stage is one file of this package with a function `run(job) -> Result`. What a stage leaves in the folder is all
that the next one needs, so an interrupted job goes on with `--resume`.
"""

from __future__ import annotations

import importlib
import json
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from pellucid import events, tasks
from pellucid.align.rollout import Rollouts
from pellucid.data import chats
from pellucid.errors import BadInput, Interrupted, PellucidError
from pellucid.files import write_atomic
from pellucid.grow import recipe, report, words  # noqa: F401  (words: its messages)
from pellucid.grow.config import GrowConfig
from pellucid.grow.corpus import split_corpus
from pellucid.grow.memory import StageMemory
from pellucid.grow.plan import Plan, PlanCard, make_plan
from pellucid.messages import say, three_parts
from pellucid.models import load, save
from pellucid.nn import Decoder
from pellucid.runtime import choose_device, choose_threads, machine_card
from pellucid.tasks.evaluate import distinct_problems
from pellucid.tokenizers import Tokenizer
from pellucid.train import Run
from pellucid.train.run import C, H


@dataclass
class Result:
    """What a stage has to say; see the report."""

    metric: str
    unit: str
    higher_is_better: bool
    before: float | None
    after: float | None
    details: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


@dataclass
class Report(events.Event):
    """The whole report of a finished job: the last line of stdout with --json. It is written flat: `kind` and `time`
    stand beside the report's own keys."""

    kind = "report"
    flat: ClassVar[str] = "report"
    report: dict[str, Any]


FILES = {"tokenizer": "tokenizer", "pretrain": "pretrain", "sft": "sft", "grpo": "reinforce", "quantize": "quantize",
         "evaluate": "evaluate", "tools": "tools"}


FINAL = 20261124  # of the final evaluation's problems; changed whenever a recipe has been chosen by looking at them


class Job:
    """The state of a run: settings, plan, clock, the model as it stands, and the report so far."""

    def __init__(self, config: GrowConfig, began: float | None = None):
        self.config = config
        self.folder = config.out
        self.spent_before = 0.0
        self._began = time.monotonic() if began is None else began
        self.mix = recipe.task_mix()
        self.tokenizer: Tokenizer
        self.model: Decoder
        self.plan: Plan
        self.report: dict[str, Any] = {}
        self.done: list[str] = []
        self.began: dict[str, float] = {}  # stage -> `elapsed` when it first began
        self.budgets: dict[str, float] = {}  # stage -> seconds of its loop
        self.measured = 0.0  # seconds of the latest evaluation that is reported

    # --- the clock ----------------------------------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        """Seconds of work so far, those before an interruption included."""
        return self.spent_before + time.monotonic() - self._began

    @property
    def total(self) -> float:
        return self.config.minutes * 60

    def seconds_for(self, stage: str) -> float:
        """The stage's share of the time that was left when it first began."""
        left = self.total - self.began.setdefault(stage, self.elapsed) - recipe.tail_seconds(self.measure_seconds)
        return max(2.0, recipe.SHARES[stage] * left)

    def loop_seconds(self, stage: str, after: float = 0.0) -> float:
        """What remains of it for the stage's loop: less what was spent to get there, and `after` for what follows.

        Decided once: a resumed stage has the same budget, so its schedule goes on where it was.
        """
        if stage not in self.budgets:
            spent = self.elapsed - self.began.setdefault(stage, self.elapsed)
            self.budgets[stage] = max(2.0, self.seconds_for(stage) - spent - after)
            self._save_state()
        return self.budgets[stage]

    @property
    def problems(self) -> int:
        """Held-out problems in the final evaluations: 1000 from the default dial on (standard error 1.5 points)."""
        return recipe.problems(self.config.minutes, self.plan.tokens_per_second)

    @property
    def measure_seconds(self) -> float:
        """What one evaluation on them should take: what the latest one took, where there was one."""
        return self.measured or recipe.measure_seconds(self.problems, self.plan.tokens_per_second)

    def affordable(self, evaluations: float, after: float) -> int:
        """Problems of each of so many evaluations: all of them, or where something has slowed the machine down as many as
        there is still time for (a fifth at least), less the seconds of what comes after."""
        left = self.total - self.elapsed - after
        return int(min(self.problems, max(self.problems / 5, self.problems * left / (evaluations * self.measure_seconds))))

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        self._open()
        log = events.RunLog(self.folder / "events.jsonl")
        try:
            with events.subscribed(log):
                if not self.done:
                    events.emit(PlanCard(asdict(self.plan)))
                names = [s["stage"] for s in self.plan.stages]
                for index, stage in enumerate(names, 1):
                    if stage not in self.done:
                        self._stage(stage, index, len(names))
                self._finish()
        except KeyboardInterrupt as stop:
            self._save_state()
            if isinstance(stop, Interrupted):
                raise
            raise Interrupted(say("grow.interrupted"), next=self.resume_command) from None
        finally:
            log.close()
        return self.report

    @property
    def resume_command(self) -> str:
        return f"{self.config.command} --resume"

    def _open(self) -> None:
        state_file = self.folder / "state.json"
        if self.config.resume and state_file.exists():
            return self._reopen(state_file)
        self._refuse_to_overwrite(state_file)
        self._read_what_is_given()
        given = self._given_model()
        self.plan = make_plan(self.config, given)
        for old in ("events.jsonl", "state.json", "report.json", "report.html"):
            (self.folder / old).unlink(missing_ok=True)
        for old in ("stages", "model", "model-int8"):  # what an earlier job left must not be taken for this one's
            shutil.rmtree(self.folder / old, ignore_errors=True)
        self.report = {
            "schema": 1, "name": self.folder.name, "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.config.command, "seed": self.config.seed, "minutes_asked": self.config.minutes,
            "machine": machine_card(), "plan": asdict(self.plan), "stages": [], "prompts": [], "model": "model",
        }
        self._remember_prompts()
        self._save_state()

    def _refuse_to_overwrite(self, state_file: Path) -> None:
        """An earlier job in this folder makes place; nothing else does."""
        if self.config.model and Path(self.config.model).resolve().is_relative_to(self.folder.resolve()):
            raise BadInput(f"the model {self.config.model} lies inside the job's own folder {self.folder}",
                           "a new job replaces what lies there", "give another folder with --out")
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not there.is_dir():
            raise BadInput(f"--out {self.folder} is not possible", f"{there} is a file", "give another folder with --out")
        if state_file.exists():
            events.note(say("grow.fresh", folder=str(self.folder)))
        elif self.config.resume:
            events.note(say("grow.nothing", folder=str(self.folder)))
        if not state_file.exists() and self.folder.is_dir() and any(self.folder.iterdir()):
            raise BadInput(f"--out {self.folder} is not empty, and no job of pellucid made it",
                           "a new job would replace what lies there", "give a new folder with --out")

    def _read_what_is_given(self) -> None:
        """One's own files, once from end to end: what is wrong with them is told now, not in the middle of the job."""
        if self.config.corpus is not None:
            split_corpus(self.config)
        if self.config.data is not None:
            for _ in chats.read_chats(self.config.data):
                pass

    def _given_model(self) -> Any:
        if not self.config.model:
            return None
        self.tokenizer = Tokenizer.load(self.config.model)
        self.model = load(self.config.model)
        if self.tokenizer.end_of_turn_id is None:
            raise BadInput(*three_parts("error.no_template", model=self.config.model))
        return self.model.spec

    def _reopen(self, state_file: Path) -> None:
        try:
            state = json.loads(state_file.read_text(encoding="utf-8"))
            if state["settings"] != self.config.settings:  # threads, device and language may differ
                raise BadInput(*three_parts("error.settings", command=state["command"]))
            self.plan, self.report, self.done = Plan(**state["plan"]), state["report"], state["done"]
            if self.config.device != "auto":
                self.plan.device = str(choose_device(self.config.device).value)
            self.spent_before = state["elapsed"]
            self.began, self.budgets, self.measured = state["began"], state["budgets"], state["measured"]
            if "tokenizer" in self.done:
                self.tokenizer = Tokenizer.load(self.stage_folder("tokenizer"))
            if self.config.model:
                self._given_model()
            trained = [s for s in ("pretrain", "sft", "grpo") if s in self.done]
            if trained:
                self.model = load(self.stage_folder(trained[-1]), device=self.plan.device)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, OSError) as error:
            raise BadInput(*three_parts("error.state", file=state_file, text=f"{type(error).__name__}: {error}",
                                  command=self.config.command)) from error
        choose_threads(self.config.threads or self.plan.threads)  # sums over others round differently
        events.note(say("grow.resumed", done=", ".join(self.done) or "-"))

    def _stage(self, stage: str, index: int, count: int) -> None:
        planned = self.seconds_for(stage) if stage in recipe.SHARES else self._predicted(stage)["seconds"]
        events.emit(events.StageBegin(stage, index, count, say(f"grow.stage.{stage}"), planned))
        began, memory = self.began.setdefault(stage, self.elapsed), StageMemory(self.plan.device)
        module = importlib.import_module(f"pellucid.grow.{FILES[stage]}")
        result: Result = module.run(self)
        seconds = self.elapsed - began
        self.report["stages"].append({
            "stage": stage, "title": say(f"grow.stage.{stage}"), "file": f"src/pellucid/grow/{FILES[stage]}.py",
            "seconds_planned": self._predicted(stage)["seconds"], "seconds": round(seconds, 1),
            "memory_predicted_bytes": self._predicted(stage)["memory_bytes"], "memory_peak_bytes": memory.peak,
            "memory_peak_so_far": memory.whole,
            **asdict(result),
        })
        self.done.append(stage)
        self._save_state()
        events.emit(events.StageEnd(stage, seconds, result.before, result.after, result.metric, result.unit,
                                    result.higher_is_better))

    def _predicted(self, stage: str) -> dict[str, Any]:
        return next(s for s in self.plan.stages if s["stage"] == stage)

    def _finish(self) -> None:
        self.report["minutes_spent"] = round(self.elapsed / 60, 2)
        report.write(self.report, self.folder, self.config.lang)
        self._save_state()
        events.emit(Report(self.report))

    def _save_state(self) -> None:
        if not hasattr(self, "plan"):
            return
        state = {"command": self.config.command, "settings": self.config.settings, "elapsed": self.elapsed, "done": self.done,
                 "began": self.began, "budgets": self.budgets, "measured": self.measured, "plan": asdict(self.plan), "report": self.report}
        write_atomic(self.folder / "state.json", json.dumps(events.plain(state), ensure_ascii=False) + "\n")

    # --- what stages share --------------------------------------------------------------------------------------------

    def stage_folder(self, stage: str) -> Path:
        return self.folder / "stages" / stage

    def rollouts(self, model: Decoder | None = None) -> Rollouts:
        return Rollouts(model or self.model, self.tokenizer, self.mix, max_tokens=recipe.MAX_TOKENS)

    def measure(self, model: Decoder | None = None, n: int | None = None, k: int = 1, seed: int = FINAL) -> tasks.TaskScores:
        """Held-out problems; greedy for k = 1, else k samples of each at temperature 1. `seed` chooses the problems: those of
        the final evaluation decide nothing, neither in a run nor in the choice of the recipe. The curves draw others (a few
        are drawn twice by chance)."""
        return tasks.evaluate(self.mix, self.rollouts(model).for_evaluation(0), n or self.problems, k, seed)

    def _remember_prompts(self) -> None:
        """One held-out problem of each task, answered after every stage."""
        scores: dict[str, tasks.Problem] = {}
        for problem in distinct_problems(self.mix, 60, random.Random(self.config.seed + 77)):
            scores.setdefault(problem.task, problem)
        self.prompts = list(scores.values())
        if not self.report["prompts"]:
            self.report["prompts"] = [{"task": p.task, "prompt": p.prompt, "answers": []} for p in self.prompts]

    def show_samples(self, stage: str, model: Decoder | None = None) -> None:
        """The same prompts, greedily, as the model answers them now."""
        if not hasattr(self, "prompts"):
            self._remember_prompts()
        groups = self.rollouts(model).groups(self.prompts, 1, 0.0, 0)
        for row, g in zip(self.report["prompts"], groups):
            row["answers"] = [a for a in row["answers"] if a["stage"] != stage]
            row["answers"].append({"stage": stage, "completion": g.texts[0], "rewards": g.rewards[0]})
            events.emit(events.SampleShown(stage, g.problem.prompt, g.texts[0], g.rewards[0]))

    def trained(self, stage: str, loop: Run[C, H]) -> H:
        """The loop run to its end, or on from where it was interrupted; the model saved, and its answers shown."""
        if self.config.resume:
            loop.resume()
        history = loop.run()
        save(self.model, self.stage_folder(stage), tokenizer=self.tokenizer)
        self.show_samples(stage)
        return history

    def looked_at(self) -> tuple[str, float, dict[str, Any]]:
        """The accuracy curve of fine-tuning and GRPO: few held-out problems, none of the final evaluation."""
        scores = self.measure(n=min(120, self.problems), seed=2)
        return "accuracy", scores.pass_at_1, {"problems": min(120, self.problems), "format": scores.format, "length": scores.mean_length, "by_task": scores.by_task}

    def final_scores(self, name: str, model: Decoder | None = None, n: int | None = None) -> tasks.TaskScores:
        """The greedy evaluation that is reported under this name; its seconds tell what the next one will take."""
        began, n = self.elapsed, n or self.problems
        greedy = self.measure(model, n)
        self.measured = (self.elapsed - began) * self.problems / n
        row: dict[str, Any] = {
            "pass@1": greedy.pass_at_1, "standard_error": greedy.standard_error, "format": greedy.format,
            "reasoning": greedy.reasoning, "mean_length": greedy.mean_length, "truncated": greedy.truncated,
            "problems": greedy.n, "by_task": {t: {"pass@1": d["pass_at_1"], "format": d["format"]} for t, d in greedy.by_task.items()}}
        self.report.setdefault("evaluation", {})[name] = row
        return greedy


def grow(config: GrowConfig, began: float | None = None) -> dict[str, Any]:
    """Runs (or goes on with) the job; returns the report."""
    try:
        return Job(config, began).run()
    except MemoryError as error:
        raise PellucidError(*three_parts("error.memory", text=error)) from error
