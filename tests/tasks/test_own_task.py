"""A task of one's own: the documented example, run as it stands, and an error for each way of getting it wrong."""

import re
import subprocess
import sys
import textwrap

import pytest

from pellucid.cli.eval import task_of
from pellucid.errors import BadInput
from pellucid.tasks import TASKS, Completion, evaluate, is_heldout, load_object, make, own

EXAMPLE = textwrap.dedent(re.search(r"(    # parity.py\n.*?)\n    \$", own.__doc__, re.S)[1])


def write(path, text=EXAMPLE):
    path.write_text(textwrap.dedent(text))
    return path


def test_the_documented_example_is_a_whole_task(tmp_path):
    spec = f"{write(tmp_path / 'parity.py')}:Parity"
    task = make(spec)
    seen = []

    def generate(problems, draws, temperature):
        seen.extend(problems)
        return [[Completion(str(p.answer) if i % 2 else "perhaps", 1, True)] for i, p in enumerate(problems)]

    scores = evaluate(task, generate, n=20)
    assert scores.pass_at_1 == 0.5 and scores.format == 1 and task.name == "parity"
    assert all(is_heldout("parity", p.key) and p.key == p.prompt for p in seen)
    assert {p.answer for p in seen} == {"yes", "no"}
    mixture = task_of((spec, "sorting"))
    assert mixture.of(seen[0]).grade(seen[0], seen[0].answer)["correct"] == 1


def test_every_name_is_found_by_the_command_line():
    assert set(task_of(tuple(TASKS)).tasks) == set(TASKS)


def test_all_that_can_be_replaced(tmp_path):
    task = make(f"""{write(tmp_path / 'double.py', '''
        from pellucid.tasks import OwnTask

        class Double(OwnTask):
            name, thinks, weights = "twice", True, {"correct": 2.0}

            def __init__(self, most=9):
                self.most = most

            def draw(self, rng):
                n = rng.randint(0, self.most)
                return f"Double {n}.", 2 * n

            def key(self, question, answer):
                return str(-answer)

            def think(self, question, answer, rng):
                return f"{answer // 2}+{answer // 2}"

            def check(self, answer, given):
                return 1.0 if given == str(answer) else 0.5 if given.isdigit() else 0.0
        ''')}:Double""", most=50)
    import random
    rng = random.Random(0)
    p = task.sample(rng, "train")
    assert task.most == 50 and p.task == "twice" and p.key == str(-p.answer)
    text = task.demonstrate(p, rng)
    assert text == f"<think>\n{p.answer // 2}+{p.answer // 2}\n</think>\n\n{p.answer}"
    assert task.grade(p, text) == {"format": 1, "correct": 1, "progress": 1}
    assert task.grade(p, "<think>a</think>1") == {"format": 1, "correct": 0, "progress": 0.45}
    assert task.grade(p, str(p.answer)) == {"format": 0, "correct": 0, "progress": 0}


def test_a_module_of_the_current_folder(tmp_path):
    write(tmp_path / "parity_here.py")
    code = "from pellucid.tasks import make; print(make('parity_here:Parity').name)"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "parity\n", done.stderr


def test_a_file_is_run_once_and_may_import_its_neighbours(tmp_path):
    write(tmp_path / "neighbour.py", "WORDS = ['a']")
    file = write(tmp_path / "shared.py", "from neighbour import WORDS\nprint('run')\nseen = []\n\nclass Inner:\n    value = 3\n")
    assert load_object(f"{file}:seen") is load_object(f"{file}:seen") and load_object(f"{file}:Inner.value") == 3
    assert str(tmp_path) not in sys.path


HEAD = "from pellucid.tasks import OwnTask\n"


@pytest.mark.parametrize("text, name, message", [
    (None, "X", "there is no file"), ("", "X", "has no X"), ("class Parita: pass", "Parity", "did you mean 'Parita'"),
    ("1/0", "X", "ZeroDivisionError"), ("def (", "X", "SyntaxError"), ("X = 3", "X", "is no class"),
    ("class X: pass", "X", "has no sample, demonstrate, grade"), (HEAD + "class X(OwnTask): pass", "X", "needs a method draw"),
    (HEAD + "class X(OwnTask):\n def draw(self, rng): return 'q', 1/0", "X", r"division by zero \(own.py:3 in draw\)"),
    (HEAD + "class X(OwnTask):\n def draw(self, rng): return 'q', 1", "X", "no (train|heldout) problem of x"),
    (HEAD + "class X(OwnTask):\n def draw(self, rng): return str(rng.random()), 1\n def write(self, a): return 'two'\n"
            " def check(self, a, given): return given == '1'", "X", "does not grade its own demonstration"),
    (HEAD + "class X(OwnTask):\n def draw(self, rng): return str(rng.random()), 1\n def check(self, a, g): return 7", "X",
     "check gave 7"),
    (HEAD + "class X(OwnTask):\n def __init__(self, need): pass\n def draw(self, rng): return 'q', 1", "X", "cannot be built"),
])
def test_a_mistake_is_told_before_the_run(tmp_path, text, name, message):
    if text is not None:
        write(tmp_path / "own.py", text)
    with pytest.raises(BadInput) as error:
        make(f"{tmp_path / 'own.py'}:{name}")
    assert re.search(message, str(error.value)), error.value


@pytest.mark.parametrize("spec, message", [
    ("nowhere_to_be_found:X", "there is no module"), (":X", "names nothing"), ("a:", "names nothing"), ("a:b c", "names nothing"),
    ("json:nothing", "json has no nothing"), ("json:dumps", "is no class")])
def test_specs_that_name_nothing(spec, message):
    with pytest.raises(BadInput, match=message):
        make(spec)


def test_unknown_dials_of_an_own_task(tmp_path):
    with pytest.raises(BadInput, match="cannot be built"):
        make(f"{write(tmp_path / 'parity.py')}:Parity", digits=3)
