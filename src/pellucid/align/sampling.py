"""Where the online loop's samples come from: rollouts shared among processes, and with a lag sampled before they are learned from.

    lag = 0     sample R0 | learn R0 | sample R1 | learn R1 | ...           by the weights of now

    lag = 1     sample R0 | learn R0 | learn R1 | learn R2 | ...
                          | sample R1| sample R2| sample R3| ...            beside it, by the weights that the step begins with

So a rollout is learned from `lag` steps after the weights that sampled it. With `overlap` the second line runs in a thread of its own, by
a copy of the weights; without it, before the update. Both give the same run bit for bit: what is drawn depends on the problems' own
stream of random numbers and on the weights of the step's beginning, and nothing runs beside the loop between two steps, when it
evaluates and saves. What the lag changes is the importance ratio: see `corrections.py` and `OnlineLoop`.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pellucid.align.beside import PATIENCE, Beside
from pellucid.align.credit import live_in
from pellucid.align.metrics import mean_of
from pellucid.align.online_config import OnlineConfig
from pellucid.align.pending import Pending, groups_from, groups_state
from pellucid.align.prompts import Prompts
from pellucid.align.rollout import Group, Rollouts, components, trained_lengths
from pellucid.align.sharing import for_evaluation
from pellucid.tasks import Completion, Problem, Task
from pellucid.train.ranks import Ranks

if TYPE_CHECKING:
    from pellucid.align.online import OnlineHistory


class Sampling:
    """Rollouts in the order in which they are learned from. `step` is a step's frame; `take` and `finish` are its two halves.

    copy: whether the weights that sample are those that are trained, so that sampling beside the update needs a copy of them.
    """

    def __init__(self, rollouts: Rollouts, task: Task, config: OnlineConfig, ranks: Ranks, copy: bool):
        self.rollouts, self.task, self.config, self.ranks, self.copy = rollouts, task, config, ranks, copy
        self.overlap = config.overlap and config.lag > 0
        self.theirs = ranks.apart() if self.overlap else ranks  # messages beside those of the update
        self.rng = random.Random(config.seed)
        self.ahead: deque[Pending] = deque()  # sampled and not yet learned from, the oldest first
        self.beside: Beside[list[Pending]] | None = None
        self.begun: dict[str, Any] = {}  # where its problems come from

    # --- a step -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def step(self, left: int, history: OnlineHistory) -> Iterator[Pending]:
        """What to learn from inside the `with` block, which later rollouts are sampled beside. left: steps of the run, this one included."""
        try:
            yield self.take(left, history)
            self.finish(history)
        except BaseException:
            self.abandon()
            raise

    def take(self, left: int, history: OnlineHistory) -> Pending:
        began = perf_counter()
        self.abandon(None)  # what an interrupted step left behind
        wanted = max(1, min(self.config.lag + 1, left))
        while len(self.ahead) < (1 if self.overlap else wanted):
            self._arrived(self.collect(history.steps), history)
        if missing := wanted - len(self.ahead):
            self._begin(missing, history.steps)
        history.waiting_seconds += perf_counter() - began
        return self.ahead.popleft()

    def finish(self, history: OnlineHistory) -> None:
        """Waits for what is sampled beside."""
        if self.beside is None:
            return
        began = perf_counter()
        for pending in self.beside.result():
            self._arrived(pending, history)
        self._ended()
        history.waiting_seconds += perf_counter() - began

    def _begin(self, count: int, step: int) -> None:
        self.begun = self.source()
        if self.copy:
            self.rollouts.hold()
        self.beside = Beside(lambda check: [self.collect(step, check) for _ in range(count)], self.rollouts.device)

    def abandon(self, seconds: float | None = PATIENCE) -> None:
        """Ends what is sampled beside, if it ends within so many seconds; a step that follows draws it again."""
        if self.beside is not None and self.beside.abandon(seconds):
            self._ended()
            self.go_back(self.begun)

    def _ended(self) -> None:
        self.beside = None
        self.rollouts.let_go()

    def _arrived(self, pending: Pending, history: OnlineHistory) -> None:
        self.ahead.append(pending)
        history.sampled += pending.tokens
        history.sampling_seconds += pending.seconds

    # --- a rollout ----------------------------------------------------------------------------------------------------

    def collect(self, step: int = 0, check: Callable[[], None] | None = None) -> Pending:
        """Rollouts until at least half of `prompts` groups teach something, or `rounds` are spent. step: of the weights.
        check: called now and then, of what runs beside the loop."""
        c, began, before = self.config, perf_counter(), self.source()
        groups: list[Group] = []
        told: list[tuple[dict[str, float], int]] = []
        for _ in range(max(1, c.rounds)):
            problems, seed = self.draw()
            made, metrics = self._groups(problems, c.group, c.temperature, seed, check)
            groups += made
            told.append((metrics, len(made)))
            if c.objective.dead_groups != "drop" or int(self.live(groups).sum()) * 2 >= c.prompts:
                break
        return Pending(before, groups, mean_of(told), step, perf_counter() - began)

    def groups(self, problems: Sequence[Problem], n: int, temperature: float, seed: int) -> list[Group]:
        """n graded completions of each problem; of several processes each samples and grades its share of the problems."""
        return self._groups(problems, n, temperature, seed)[0]

    def _groups(self, problems: Sequence[Problem], n: int, temperature: float, seed: int,
                check: Callable[[], None] | None = None) -> tuple[list[Group], dict[str, float]]:
        ranks = self.ranks if check is None else self.theirs
        if ranks.size == 1:
            return self.rollouts.groups(problems, n, temperature, seed, each=check), self.rollouts.metrics
        numbers = list(ranks.mine(range(len(problems))))
        made = self.rollouts.groups([problems[i] for i in numbers], n, temperature, seed, numbers, check)
        parts = ranks.gathered({"groups": groups_state(made), "metrics": self.rollouts.metrics, "count": len(made)})
        groups = groups_from(ranks.dealt([p["groups"] for p in parts]), problems, self.config.max_tokens)
        return groups, mean_of([(p["metrics"], p["count"]) for p in parts])

    def for_evaluation(self, seed: int) -> Callable[[list[Problem], int, float], list[list[Completion]]]:
        """The `generate` that `tasks.evaluate` asks for, likewise shared."""
        return for_evaluation(self.rollouts, self.ranks, seed)

    def draw(self) -> tuple[list[Problem], int]:
        """The problems of one rollout, and the seed of its samples."""
        return [self.task.sample(self.rng, "train") for _ in range(self.config.prompts)], self.rng.getrandbits(62)

    def components(self, groups: list[Group]) -> dict[str, Tensor]:
        """name -> (N, G), of the rewards that graded any of these groups; of all of them, NaN, where none did."""
        return components(groups, self.rollouts.rewards.names)

    def weights(self, groups: list[Group]) -> dict[str, float]:
        """Of the reward components that these groups have."""
        parts = self.components(groups)
        return {k: w for k, w in self.rollouts.rewards.weights.items() if k in parts}

    def live(self, groups: list[Group]) -> Tensor:
        """Which of them teach something, (N,) bool."""
        return live_in(self.components(groups), trained_lengths(groups) > 0, self.config.objective, self.weights(groups))

    # --- stop and go on -----------------------------------------------------------------------------------------------

    def source(self) -> dict[str, Any]:
        """Where the next problems come from."""
        version, numbers, gauss = self.rng.getstate()
        rows = {"task": self.task.state()} if isinstance(self.task, Prompts) else {}
        return rows | {"rng": [version, list(numbers), gauss]}

    def go_back(self, source: dict[str, Any]) -> None:
        if isinstance(self.task, Prompts):
            self.task.load_state(source["task"])
        version, numbers, gauss = source["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))

    def state(self) -> dict[str, Any]:
        return self.source() | {"ahead": [p.state() for p in self.ahead]}

    def restore(self, state: dict[str, Any]) -> None:
        self.ahead.clear()
        for saved in state.get("ahead", []):
            self.go_back(saved["source"])  # the problems are drawn again, the samples are read
            problems: list[Problem] = []
            while len(problems) < len(saved["groups"]):
                problems += self.draw()[0]
            self.ahead.append(Pending.of(saved, problems, self.config.max_tokens))
        self.go_back(state)
