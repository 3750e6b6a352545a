"""Countdown: hand-made cheats, partial credit, the split by brute force, an independent solver."""

import itertools
import math
import random
import re

import pytest

from pellucid.errors import BadInput
from pellucid.tasks import Problem, is_heldout, make
from pellucid.tasks.countdown import tries

COUNTDOWN = Problem("countdown", "Make 26 from 4,12,18.", ((4, 12, 18), 26), "4,12,18")


def grade(problem, answer, thought="hm"):
    return make(problem.task).grade(problem, f"<think>\n{thought}\n</think>\n\n{answer}")


@pytest.mark.parametrize("answer", ["(18-4)+12", "18-4+12", "12+18-4", "12 + (18 - 4)", "((18-4)+12)", "12-4+18",
                                    "(12)+(18)-(4)", "12-(4-18)"])
def test_countdown_accepts_every_lawful_expression(answer):
    assert grade(COUNTDOWN, answer) == {"format": 1.0, "correct": 1.0, "progress": 1.0}


@pytest.mark.parametrize("answer", ["26", "18+12-4-4+4", "18+8", "4+4+18", "12+18", "18-4+12+0", "1*(18-4+12)",
                                    "12+14", "2+6+18", "18-4*12", "412-18", "4+12+18"])
def test_countdown_well_formed_but_wrong(answer):
    graded = grade(COUNTDOWN, answer)
    assert graded["format"] == 1 and graded["correct"] == 0 and graded["progress"] < 0.95


@pytest.mark.parametrize("answer", ["-4+18+12", "+18-4+12", "18--4+12", "(18-4)+12=26", "(18-4)+12.0", "18.0-4+12",
                                    "(18-4)+12 yes",
                                    "018-4+12", "18-4+1 2", "(18-4)+12 (18-4)+12", "(18-4)+12\n(18-4)+12", "１８-4+12",
                                    "18−4+12",
                                    "(18-4)+12+__import__('os').system('x')*0", "18-4+12+0*9**9**9", "18-4+12//1",
                                    "18-4+12/1",
                                    "18-4+12 # ok", "`18-4+12`", "$18-4+12$", "[18-4+12]", "((18-4)+12", "(18-4)+12)",
                                    "18-4+12,",
                                    "abs(18-4)+12", "18-4+12;", "Answer: 18-4+12", "(" * 30 + "18-4+12" + ")" * 30])
def test_countdown_cheats_outside_the_grammar(answer):
    graded = grade(COUNTDOWN, answer)
    assert graded["format"] == 0 and graded["correct"] == 0


def test_countdown_repeated_numbers_count_each_time():
    twice = Problem("countdown", "Make 13 from 5,5,3.", ((5, 5, 3), 13), "3,5,5")
    assert grade(twice, "5+5+3")["correct"] == 1
    assert grade(twice, "5+3+5")["correct"] == 1
    assert grade(Problem("countdown", "", ((5, 4, 4), 13), "4,4,5"), "5+5+3")["correct"] == 0
    assert grade(twice, "10+3")["correct"] == 0


@pytest.mark.parametrize("line, lawful", [
    ("18-12=6,6*4=24 no", True), ("18-4=14,14+12=26 yes", True), ("12-18=-6,4*6=24 no", False),
    ("18-12=7,7*4=28 no", False),
    ("18-12=6,6*4=24 yes", False), ("18-4=14,14+12=26 no", False), ("18-12=6,6*6=36 no", False),
    ("18-12=6,6+6=12 no", False),
    ("18-12=6 no", False), ("18-12=6,6*4=24,24+4=28 no", False), ("5-4=1,1+1=2 no", False), ("18-12=6,6*4=24", False),
    ("hm", False), ("1+1=2,2+2=4 no", False), ("18-12=06,6*4=24 no", True), ("", False),
])
def test_countdown_partial_credit_for_lawful_lines(line, lawful):
    graded = grade(COUNTDOWN, "4+12+18", thought=line or "hm")
    reaches = lawful and line.endswith("yes")
    assert graded["progress"] == pytest.approx(0.9 * (0.25 + 0.5 * lawful + 0.25 * reaches))


def test_countdown_repeating_a_line_earns_nothing():
    line = "18-12=6,6*4=24 no"
    once, often = grade(COUNTDOWN, "1", thought=line), grade(COUNTDOWN, "1", thought="\n".join([line] * 20))
    assert often["progress"] < 0.1 * once["progress"] + 0.01


def results_by_brute_force(numbers, operations, most):
    """All values over all orders and all shapes of bracket, with intermediates in 1..most; not our enumeration."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for size in range(1, len(numbers)):
        for picked in itertools.combinations(range(len(numbers)), size):
            left = [numbers[i] for i in picked]
            right = [numbers[i] for i in range(len(numbers)) if i not in picked]
            for a, b in itertools.product(results_by_brute_force(left, operations, most),
                                          results_by_brute_force(right, operations, most)):
                found.update(v for o, v in (("+", a + b), ("-", a - b), ("*", a * b)) if o in operations
                             and 1 <= v <= most)
    return found


@pytest.mark.parametrize("count, operations", [(2, "+-*"), (3, "+-*"), (3, "+-"), (4, "+-*")])
def test_countdown_search_is_complete_and_every_try_true(count, operations):
    rng = random.Random(count)
    for _ in range(30 if count < 4 else 5):
        numbers = tuple(sorted(rng.randint(1, 20) for _ in range(count)))
        every = tries(numbers, operations, 99)
        assert {t.value for t in every} == results_by_brute_force(numbers, operations, 99)
        for t in every:
            assert eval(t.expression, {"__builtins__": {}}) == t.value    # our own text, in a test
            assert sorted(map(int, re.findall(r"[0-9]+", t.expression))) == list(numbers)
            assert all(step.left >= step.right for step in t.steps)


def test_countdown_splits_all_sets_of_numbers_whatever_their_order_and_target():
    sets = list(itertools.combinations_with_replacement(range(1, 21), 3))
    assert len(sets) == math.comb(22, 3) == 1540
    heldout = {s for s in sets if is_heldout("countdown", ",".join(map(str, s)))}
    assert 110 < len(heldout) < 200
    task, rng = make("countdown"), random.Random(0)
    for split in ("train", "heldout"):
        seen = {tuple(sorted(task.sample(rng, split).answer[0])) for _ in range(8000 if split == "train" else 2000)}
        assert seen <= (heldout if split == "heldout" else set(sets) - heldout)
        assert len(seen) > 0.95 * (len(heldout) if split == "heldout" else 1540 - len(heldout))


def test_countdown_demonstrations_are_short_and_stop_at_the_right_try():
    task, rng = make("countdown"), random.Random(0)
    lengths = []
    for _ in range(1000):
        problem = task.sample(rng, "train")
        text = task.demonstrate(problem, rng)
        lines = text.split("</think>")[0].strip().split("\n")[1:]
        assert [line.endswith(" yes") for line in lines] == [False] * (len(lines) - 1) + [True] and len(lines) <= 4
        assert len(set(lines)) == len(lines)
        lengths.append(len(text))
    assert sum(lengths) / len(lengths) < 80 and max(lengths) <= 120


def test_countdown_refuses_to_demonstrate_what_its_dials_cannot_reach():
    with pytest.raises(BadInput, match="do not reach"):
        make("countdown", operations="+").demonstrate(COUNTDOWN, random.Random(0))
