"""Each task's own rules: hand-made cheats, partial credit, splits by brute force, an independent solver."""

import itertools
import json
import math
import random
import re

import pytest

from pellucid.errors import BadInput
from pellucid.tasks import CALCULATOR_SCHEMA, TOOLS, Problem, calculate, is_heldout, make
from pellucid.tasks.countdown import tries
from pellucid.tasks.sorting import selections

COUNTDOWN = Problem("countdown", "Make 26 from 4,12,18.", ((4, 12, 18), 26), "4,12,18")
ADD = Problem("arithmetic", "Add 4 7 2 + 8 6 5.", (472, "+", 865, 1337), "472,865")
SUBTRACT = Problem("arithmetic", "Subtract 7 0 2 - 6 6 5.", (702, "-", 665, 37), "665,702")
SORT = Problem("sorting", "Sort 52,7,31,88.", (52, 7, 31, 88), "31,52,88")
MINUS = Problem("calculator", "What is 50 minus 12?", (50, "-", 12), "- 50,12", ("calculator",))
TIMES = Problem("calculator", "What is 12 times 7?", (12, "*", 7), "* 7,12", ("calculator",))
SIMPLE = "<think>\nhm\n</think>\n\n"


def grade(problem, answer, thought="hm"):
    return make(problem.task).grade(problem, f"<think>\n{thought}\n</think>\n\n{answer}")


def tool_call(source, **more):
    return "<tool_call>\n" + json.dumps({"name": "calculator", "arguments": {"expression": source}, **more}) + "\n</tool_call>"


# countdown ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer", ["(18-4)+12", "18-4+12", "12+18-4", "12 + (18 - 4)", "((18-4)+12)", "12-4+18",
                                    "(12)+(18)-(4)", "12-(4-18)"])
def test_countdown_accepts_every_lawful_expression(answer):
    assert grade(COUNTDOWN, answer) == {"format": 1.0, "correct": 1.0, "progress": 1.0}


@pytest.mark.parametrize("answer", ["26", "18+12-4-4+4", "18+8", "4+4+18", "12+18", "18-4+12+0", "1*(18-4+12)", "12+14", "2+6+18",
                                    "18-4*12", "412-18", "4+12+18"])
def test_countdown_well_formed_but_wrong(answer):
    graded = grade(COUNTDOWN, answer)
    assert graded["format"] == 1 and graded["correct"] == 0 and graded["progress"] < 0.95


@pytest.mark.parametrize("answer", ["-4+18+12", "+18-4+12", "18--4+12", "(18-4)+12=26", "(18-4)+12.0", "18.0-4+12", "(18-4)+12 yes",
                                    "018-4+12", "18-4+1 2", "(18-4)+12 (18-4)+12", "(18-4)+12\n(18-4)+12", "１８-4+12", "18−4+12",
                                    "(18-4)+12+__import__('os').system('x')*0", "18-4+12+0*9**9**9", "18-4+12//1", "18-4+12/1",
                                    "18-4+12 # ok", "`18-4+12`", "$18-4+12$", "[18-4+12]", "((18-4)+12", "(18-4)+12)", "18-4+12,",
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
    ("18-12=6,6*4=24 no", True), ("18-4=14,14+12=26 yes", True), ("12-18=-6,4*6=24 no", False), ("18-12=7,7*4=28 no", False),
    ("18-12=6,6*4=24 yes", False), ("18-4=14,14+12=26 no", False), ("18-12=6,6*6=36 no", False), ("18-12=6,6+6=12 no", False),
    ("18-12=6 no", False), ("18-12=6,6*4=24,24+4=28 no", False), ("5-4=1,1+1=2 no", False), ("18-12=6,6*4=24", False), ("hm", False),
    ("1+1=2,2+2=4 no", False), ("18-12=06,6*4=24 no", True), ("", False),
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
                found.update(v for o, v in (("+", a + b), ("-", a - b), ("*", a * b)) if o in operations and 1 <= v <= most)
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


# arithmetic -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer", ["1 3 3 7", "1337"])
def test_arithmetic_accepts_digits_all_apart_or_all_together(answer):
    assert grade(ADD, answer)["correct"] == 1


@pytest.mark.parametrize("answer", ["13 37", "1 3 3  7", "1 3 37", "1337.0", "1,337", "+1337", "-1337", "1 3 3 7 .", "1337 1337\n",
                                    "1 3 3 7\n1 3 3 7", "１３３７", "1 3 3 ７", "1e3", "0x539", "472+865", "=1337", "1 3 3 7 or 1 3 3 8", "1\n3\n3\n7"])
def test_arithmetic_cheats(answer):
    graded = grade(ADD, answer)
    assert graded["correct"] == 0 and (graded["format"] == 0 or answer == "1337 1337\n")


@pytest.mark.parametrize("answer", ["0 1 3 3 7", "01337", "1 3 3 7 1 3 3 7", "7 3 3 1", "1338", "0"])
def test_arithmetic_wrong_numbers(answer):
    graded = grade(ADD, answer)
    assert graded["format"] == 1 and graded["correct"] == 0 and graded["progress"] < 0.91


def test_arithmetic_partial_credit_counts_columns_and_digits():
    columns = "2+5+0=7\n7+6+0=13\n4+8+1=13"
    assert grade(ADD, "1 3 3 8", columns)["progress"] == pytest.approx(0.9 * (0.5 + 0.5 * 3 / 4))
    assert grade(ADD, "9 9 9 9", columns)["progress"] == pytest.approx(0.45)
    assert grade(ADD, "9 9 9 9", columns.replace("=13", "=3"))["progress"] == pytest.approx(0.15)
    assert grade(ADD, "9 9 9 9", columns + "\n" + columns)["progress"] == pytest.approx(0.225)
    assert grade(ADD, "1 3 3 7")["progress"] == 1
    assert grade(SUBTRACT, "3 7", "12-5-0=7\n10-6-1=3\n7-6-1=0") == {"format": 1, "correct": 1, "progress": 1}
    assert grade(SUBTRACT, "0 3 7")["correct"] == 0


def test_arithmetic_columns_add_up_to_the_result():
    """Read the columns back as a schoolbook does, without our code: units digits from the last carry downward."""
    task, rng = make("arithmetic", min_digits=1, max_digits=9), random.Random(0)
    for _ in range(2000):
        problem = task.sample(rng, "train")
        a, operation, b, result = problem.answer
        lines = task.demonstrate(problem, rng).split("\n</think>")[0].split("\n")[1:]
        values = [int(line.split("=")[1]) for line in lines]
        assert all(eval(line.split("=")[0], {"__builtins__": {}}) == v for line, v in zip(lines, values))
        digits = [v % 10 for v in values] + ([1] if values[-1] > 9 else [])
        assert sum(d * 10**i for i, d in enumerate(digits)) == result == (a + b if operation == "+" else a - b) >= 0
        carries = [int(re.split(r"[-+=]", line)[2]) for line in lines]
        if operation == "+":
            assert carries == [0] + [int(v > 9) for v in values[:-1]]
        else:
            assert carries == [0] + [int(int(line.split("-")[0]) > int(str(a)[::-1][i]))
                                     for i, line in enumerate(lines[:-1])]


def test_arithmetic_split_is_by_the_unordered_pair_for_both_operations():
    task, rng = make("arithmetic", min_digits=1, max_digits=2), random.Random(0)
    pairs = {split: {frozenset(p.answer[::2][:2]) for p in (task.sample(rng, split) for _ in range(6000))}
             for split in ("train", "heldout")}
    assert not pairs["train"] & pairs["heldout"] and len(pairs["heldout"]) > 300
    assert all((a, b) == (b, a) or is_heldout("arithmetic", f"{min(a, b)},{max(a, b)}") for a, b in
               (tuple(p) for p in pairs["heldout"] if len(p) == 2))


# sorting --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, correct, form", [
    ("7,31,52,88", 1, 1), ("7, 31, 52, 88", 1, 1), ("7,31,88,52", 0, 1), ("7,31,52", 0, 1), ("7,31,52,88,88", 0, 1),
    ("7,7,31,52,88", 0, 1), ("88,52,31,7", 0, 1), ("52,7,31,88", 0, 1), ("7 31 52 88", 0, 0), ("7,31,52,88,", 0, 0),
    (",7,31,52,88", 0, 0), ("07,31,52,88", 0, 0), ("7.0,31,52,88", 0, 0), ("[7,31,52,88]", 0, 0), ("7,31,52,88 sorted", 0, 0),
    ("7,31,52,88\n7,31,52,88", 0, 0), ("7,,31,52,88", 0, 0), ("７,31,52,88", 0, 0), ("7，31，52，88", 0, 0), ("-7,31,52,88", 0, 0),
    ("7<31<52<88", 0, 0), ("7,31,52,8 8", 0, 0), ("sorted([52,7,31,88])", 0, 0),
])
def test_sorting_cheats(answer, correct, form):
    graded = grade(SORT, answer)
    assert (graded["correct"], graded["format"]) == (correct, form)
    assert (graded["progress"] == 1) == bool(correct)


def test_sorting_partial_credit():
    thought = "7<52,31,88\n31<52,88\n52<88"
    assert grade(SORT, "7,31,88,52", thought)["progress"] == pytest.approx(0.9 * (0.5 + 0.25))
    assert grade(SORT, "0", thought.replace("31<52", "52<31"))["progress"] == pytest.approx(0.9 * 0.5 * 2 / 3)


def test_sorting_thoughts_are_true_and_lead_to_the_answer():
    task, rng = make("sorting"), random.Random(0)
    for _ in range(1000):
        problem = task.sample(rng, "train")
        lines = task.demonstrate(problem, rng).split("\n</think>")[0].split("\n")[1:]
        taken = [int(line.split("<")[0]) for line in lines] + [int(lines[-1].split("<")[1])]
        assert taken == sorted(problem.answer)
        assert lines == selections(problem.answer)


def test_sorting_split_holds_for_every_remaining_list_too():
    """No list that a training thought shows (of three numbers or more) is a held-out problem, and the reverse."""
    task, rng = make("sorting", min_count=3, max_count=5, max_number=20), random.Random(0)
    shown = {"train": set(), "heldout": set()}
    whole = {"train": set(), "heldout": set()}
    for split in shown:
        for _ in range(4000):
            problem = task.sample(rng, split)
            whole[split].add(frozenset(problem.answer))
            for line in [",".join(map(str, problem.answer)), *selections(problem.answer)]:
                rest = frozenset(map(int, line.split("<")[-1].split(",")))
                if len(rest) >= 3:
                    shown[split].add(rest)
    assert not shown["train"] & whole["heldout"] and not shown["heldout"] & whole["train"]
    assert len(whole["heldout"]) > 500


# calculator -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer", [tool_call("50-12"), tool_call("50 - 12"), tool_call("(50-12)"), tool_call("50.0-12"),
                                    '<tool_call>{"arguments":{"expression":"50-12"},"name":"calculator"}</tool_call>',
                                    tool_call("50-12").replace("50-12", "5\\u0030-12")])
def test_calculator_accepts_the_right_call(answer):
    assert grade(MINUS, answer) == {"format": 1.0, "correct": 1.0, "progress": 1.0}


def test_calculator_order_matters_only_where_it_matters():
    assert grade(TIMES, tool_call("7*12"))["correct"] == 1
    assert grade(MINUS, tool_call("12-50"))["correct"] == 0


@pytest.mark.parametrize("source, credit", [("38", 0), ("38+0", 0), ("50+12", 2 / 3), ("50-13", 2 / 3), ("51-13", 1 / 3), ("-12+50", 0),
                                            ("50-12+0", 0), ("(50-12)*1", 0), ("50*12", 2 / 3), ("-(12-50)", 0), ("50--12", 2 / 3)])
def test_calculator_other_expressions_are_not_what_was_asked(source, credit):
    graded = grade(MINUS, tool_call(source))
    assert graded["format"] == 1 and graded["correct"] == 0 and graded["progress"] == pytest.approx(0.9 * credit)


RIGHT = '{"name": "calculator", "arguments": {"expression": "50-12"}}'


@pytest.mark.parametrize("answer", [
    "38", "50-12", RIGHT, f"<tool_call>\n{RIGHT}", f"{RIGHT}\n</tool_call>", tool_call("50-12") + tool_call("50-12"),
    f"<tool_call>\n{RIGHT}\n{RIGHT}\n</tool_call>", f"<tool_call>\n[{RIGHT}]\n</tool_call>", tool_call("50-12") + "\n38",
    "Let me see. " + tool_call("50-12"), f"```\n{tool_call('50-12')}\n```", f"<tool_call>\n```json\n{RIGHT}\n```\n</tool_call>",
    tool_call("50-12", id=1), tool_call("50-12").replace('-12"', '-12", "x": 1'),
    tool_call("50-12").replace('{"expression"', '{"expression": "1", "expression"'),
    tool_call("50-12").replace('{"name"', '{"name": "other", "name"'),
    tool_call("50-12").replace("calculator", "Calculator"), tool_call("50-12").replace("expression", "expr"),
    tool_call("50-12").replace('"arguments": {"expression": "50-12"}', '"arguments": "{\\"expression\\": \\"50-12\\"}"'),
    tool_call("50-12").replace('"50-12"', '["50-12"]'), tool_call("50-12").replace('"50-12"', "38"),
    tool_call("50-12").replace('"', "'"), tool_call("50-12").replace("}}", "},}"), tool_call("50-12").replace("}}", "}"),
    tool_call(""), tool_call("50-12;"), tool_call("５０-12"), tool_call("__import__('os').getcwd()"), tool_call("50-12-9**9**9"),
    tool_call("50-12 <think>"), "<tool_call></tool_call>", "<tool_call>\nnull\n</tool_call>", "<tool_call>\nNaN\n</tool_call>",
    "<tool_call>\n\n\n" + RIGHT + "\n</tool_call>x", "<tool_call>" + "[" * 250 + "</tool_call>", tool_call(" " * 400 + "50-12"),
    f"<TOOL_CALL>\n{RIGHT}\n</TOOL_CALL>", tool_call("50-12").replace("</tool_call>", "<tool_call>"),
])
def test_calculator_cheats(answer):
    assert grade(MINUS, answer) == {"format": 0.0, "correct": 0.0, "progress": 0.0}


def test_calculator_call_inside_the_thought_counts_for_nothing():
    assert grade(MINUS, "38", thought=tool_call("50-12"))["format"] == 0
    assert grade(MINUS, tool_call("50-12"), thought=tool_call("50-12"))["format"] == 0


def test_calculator_prompts_mean_their_answer():
    """Every wording names both numbers, and its numbers stand on the right sides."""
    task, rng = make("calculator", operations="+-*/"), random.Random(0)
    shapes = {}
    for _ in range(3000):
        problem = task.sample(rng, "train")
        left, operation, right = problem.answer
        shown = list(map(int, re.findall(r"[0-9]+", problem.prompt)))
        assert sorted(shown) == sorted([left, right]) and problem.tools == ("calculator",)
        value = calculate(f"{left}{operation}{right}")
        assert value.isdigit(), problem
        if left != right:
            shape = re.sub(r"[0-9]+|Ann|Ben|Eva|Tom|Mia|Leo|apples|plums|pens|books|coins|cards", "_", problem.prompt)
            assert shapes.setdefault(shape, (operation, shown == [left, right])) == (operation, shown == [left, right])
    assert len(shapes) == 16 and sum(not straight for _, straight in shapes.values()) == 3


def test_calculator_split_is_by_numbers_and_operation():
    task, rng = make("calculator", max_number=30), random.Random(0)
    seen = {}
    for split in ("train", "heldout"):
        seen[split] = set()
        for _ in range(4000):
            left, operation, right = task.sample(rng, split).answer
            seen[split].add((operation, frozenset((left, right)) if operation in "+*" else (left, right)))
    assert not seen["train"] & seen["heldout"] and len(seen["heldout"]) > 50


def test_calculator_follow_up_ends_with_the_tools_answer():
    task, rng = make("calculator", operations="+-*/"), random.Random(0)
    for _ in range(500):
        problem = task.sample(rng, "train")
        messages, reply = task.follow_up(problem)
        assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
        function = messages[1]["tool_calls"][0]["function"]
        arguments = json.loads(function["arguments"])
        assert messages[2]["content"] == TOOLS[function["name"]].run(**arguments)
        assert messages[2]["tool_call_id"] == messages[1]["tool_calls"][0]["id"]
        assert task.grade_follow_up(problem, reply) == {"format": 1, "correct": 1, "progress": 1}
        assert task.grade_follow_up(problem, reply + "0")["correct"] == 0
        assert task.grade_follow_up(problem, reply + " 0")["format"] == 0


def test_the_schema_is_what_openai_clients_send_and_small():
    function = CALCULATOR_SCHEMA["function"]
    assert CALCULATOR_SCHEMA["type"] == "function" and function["name"] == "calculator"
    assert function["parameters"]["type"] == "object" and set(function["parameters"]["properties"]) == {"expression"}
    assert len(json.dumps(CALCULATOR_SCHEMA)) < 150 and TOOLS["calculator"].schema is CALCULATOR_SCHEMA
