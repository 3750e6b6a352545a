"""Arithmetic, sorting and the calculator: hand-made cheats, partial credit, splits by brute force."""

import json
import random
import re

import pytest

from pellucid.tasks import CALCULATOR_SCHEMA, TOOLS, Problem, calculate, is_heldout, make
from pellucid.tasks.sorting import selections

ADD = Problem("arithmetic", "Add 4 7 2 + 8 6 5.", (472, "+", 865, 1337), "472,865")
SUBTRACT = Problem("arithmetic", "Subtract 7 0 2 - 6 6 5.", (702, "-", 665, 37), "665,702")
SORT = Problem("sorting", "Sort 52,7,31,88.", (52, 7, 31, 88), "31,52,88")
MINUS = Problem("calculator", "What is 50 minus 12?", (50, "-", 12), "- 50,12", ("calculator",))
TIMES = Problem("calculator", "What is 12 times 7?", (12, "*", 7), "* 7,12", ("calculator",))


def grade(problem, answer, thought="hm"):
    return make(problem.task).grade(problem, f"<think>\n{thought}\n</think>\n\n{answer}")


def tool_call(source, **more):
    call = {"name": "calculator", "arguments": {"expression": source}, **more}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


# arithmetic -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer", ["1 3 3 7", "1337"])
def test_arithmetic_accepts_digits_all_apart_or_all_together(answer):
    assert grade(ADD, answer)["correct"] == 1


@pytest.mark.parametrize("answer", ["13 37", "1 3 3  7", "1 3 37", "1337.0", "1,337", "+1337", "-1337", "1 3 3 7 .",
                                    "1337 1337\n",
                                    "1 3 3 7\n1 3 3 7", "１３３７", "1 3 3 ７", "1e3", "0x539", "472+865", "=1337",
                                    "1 3 3 7 or 1 3 3 8", "1\n3\n3\n7"])
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
    assert grade(ADD, "3 3 7", columns)["progress"] == pytest.approx(0.9 * (0.5 + 0.5 * 3 / 4))
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
    (",7,31,52,88", 0, 0), ("07,31,52,88", 0, 0), ("7.0,31,52,88", 0, 0), ("[7,31,52,88]", 0, 0),
    ("7,31,52,88 sorted", 0, 0),
    ("7,31,52,88\n7,31,52,88", 0, 0), ("7,,31,52,88", 0, 0), ("７,31,52,88", 0, 0), ("7，31，52，88", 0, 0),
    ("-7,31,52,88", 0, 0), ("7<31<52<88", 0, 0), ("7,31,52,8 8", 0, 0), ("sorted([52,7,31,88])", 0, 0),
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

@pytest.mark.parametrize("answer", [tool_call("50-12"), tool_call("50 - 12"), tool_call("(50-12)"),
                                    tool_call("50.0-12"),
                                    '<tool_call>{"arguments":{"expression":"50-12"},"name":"calculator"}</tool_call>',
                                    tool_call("50-12").replace("50-12", "5\\u0030-12")])
def test_calculator_accepts_the_right_call(answer):
    assert grade(MINUS, answer) == {"format": 1.0, "correct": 1.0, "progress": 1.0}


def test_calculator_order_matters_only_where_it_matters():
    assert grade(TIMES, tool_call("7*12"))["correct"] == 1
    assert grade(MINUS, tool_call("12-50"))["correct"] == 0


@pytest.mark.parametrize("source, credit", [
    ("38", 0), ("38+0", 0), ("50+12", 2 / 3), ("50-13", 2 / 3), ("51-13", 1 / 3), ("-12+50", 0), ("50-12+0", 0),
    ("(50-12)*1", 0), ("50*12", 2 / 3), ("-(12-50)", 0), ("50--12", 2 / 3)])
def test_calculator_other_expressions_are_not_what_was_asked(source, credit):
    graded = grade(MINUS, tool_call(source))
    assert graded["format"] == 1 and graded["correct"] == 0 and graded["progress"] == pytest.approx(0.9 * credit)


RIGHT = '{"name": "calculator", "arguments": {"expression": "50-12"}}'


@pytest.mark.parametrize("answer", [
    "38", "50-12", RIGHT, f"<tool_call>\n{RIGHT}", f"{RIGHT}\n</tool_call>", tool_call("50-12") + tool_call("50-12"),
    f"<tool_call>\n{RIGHT}\n{RIGHT}\n</tool_call>", f"<tool_call>\n[{RIGHT}]\n</tool_call>",
    tool_call("50-12") + "\n38",
    "Let me see. " + tool_call("50-12"), f"```\n{tool_call('50-12')}\n```",
    f"<tool_call>\n```json\n{RIGHT}\n```\n</tool_call>",
    tool_call("50-12", id=1), tool_call("50-12").replace('-12"', '-12", "x": 1'),
    tool_call("50-12").replace('{"expression"', '{"expression": "1", "expression"'),
    tool_call("50-12").replace('{"name"', '{"name": "other", "name"'),
    tool_call("50-12").replace("calculator", "Calculator"), tool_call("50-12").replace("expression", "expr"),
    tool_call("50-12").replace('"arguments": {"expression": "50-12"}',
                               '"arguments": "{\\"expression\\": \\"50-12\\"}"'),
    tool_call("50-12").replace('"50-12"', '["50-12"]'), tool_call("50-12").replace('"50-12"', "38"),
    tool_call("50-12").replace('"', "'"), tool_call("50-12").replace("}}", "},}"),
    tool_call("50-12").replace("}}", "}"),
    tool_call(""), tool_call("50-12;"), tool_call("５０-12"), tool_call("__import__('os').getcwd()"),
    tool_call("50-12-9**9**9"),
    tool_call("50-12 <think>"), "<tool_call></tool_call>", "<tool_call>\nnull\n</tool_call>",
    "<tool_call>\nNaN\n</tool_call>",
    "<tool_call>\n\n\n" + RIGHT + "\n</tool_call>x", "<tool_call>" + "[" * 250 + "</tool_call>",
    tool_call(" " * 400 + "50-12"),
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
