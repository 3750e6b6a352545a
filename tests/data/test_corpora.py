"""The standard library as a corpus: what is in, what is out, and that no text is given twice."""

import ast
import itertools
import json
import subprocess
import sys

import pytest

from pellucid.data import corpora
from pellucid.errors import BadInput


@pytest.fixture(scope="module")
def library():
    """Every kind, parsed once: "both" begins with and contains the documents of "docs"."""
    both = list(corpora.standard_library("both"))
    docs = [d for d in both if d.source.startswith(("python/docs/", "python/topics/"))]
    return {"docs": docs, "source": list(corpora.standard_library("source")), "both": both}


@pytest.fixture
def small(tmp_path):
    """A library of our own: two modules, their tests, a table and a machine's own file."""
    files = {
        "alpha.py": '"""' + "Alpha explains itself at length. " * 10 + '"""\n\ndef f():\n    """Return f.\n\n    More."""\n'
                    '    return 1\n\nclass C:\n    """Only a docstring."""\n',
        "pkg/beta.py": 'r"""' + "Alpha explains itself at length. " * 10 + "\n\n" + "Beta differs. " * 30 + '"""\nx = 1\n',
        "test/test_alpha.py": "x = 1\n", "site-packages/other.py": "x = 1\n", "_sysconfigdata_linux.py": "x = 1\n",
        "pkg/tests/t.py": "x = 1\n", "encodings/cp1.py": "x = 1\n", "empty.py": "", "broken.py": "def (:\n",
        "latin.py": "# -*- coding: latin-1 -*-\n'''Stra\udce9e'''\n",
        "pydoc_data/topics.py": "topics = {'short': " + repr("A section about names. " * 20) + ",\n 'long': "
                                + repr("The chapter. " * 40 + "\n\n" + "A section about names. " * 20) + "}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return tmp_path


def test_what_is_left_out(small):
    assert corpora.modules(small) == ["alpha.py", "broken.py", "empty.py", "latin.py", "pkg/beta.py"]
    assert [d.source for d in corpora.standard_library("source", small)] == [
        "python/alpha.py", "python/broken.py", "python/latin.py", "python/pkg/beta.py"]


def test_docs_hold_each_paragraph_once_and_chapters_before_their_sections(small):
    documents = list(corpora.standard_library("docs", small))
    assert [d.source for d in documents] == ["python/topics/long", "python/docs/alpha.py", "python/docs/pkg/beta.py"]
    text = "\n".join(d.text for d in documents)
    assert text.count("Alpha explains itself at length. " * 9) == 1 and text.count("A section about names. " * 19) == 1
    assert documents[1].text.endswith("Return f.\n\nMore.\n\nOnly a docstring.\n") and documents[2].text.startswith("Beta differs.")


def test_both_gives_every_text_once(small):
    texts = {d.source: d.text for d in corpora.standard_library("both", small)}
    assert texts["python/alpha.py"] == "\ndef f():\n    return 1\n\nclass C:\n    ...\n"
    assert texts["python/pkg/beta.py"] == "x = 1\n" and texts["python/broken.py"] == "def (:\n"
    assert "python/docs/alpha.py" in texts and "python/topics/long" in texts


@pytest.mark.parametrize("code, expected", [
    ('def f(): "doc"\n', 'def f(): "doc"\n'),
    ('def f():\n    "doc"; x = 1\n', 'def f():\n    "doc"; x = 1\n'),
    ('def f():\n    "doc"  # why\n    x = 1\n', "def f():\n    x = 1\n"),
    ('class C:\n\t"""a\n\tb"""', "class C:\n\t...\n"),
    ('"""m"""', ""), ("x = 'no doc'\n", "x = 'no doc'\n"),
    ('x = 1\n\x0c\ndef f():\n    "a\x0c\u2028b"\n    return "语"\n', 'x = 1\n\x0c\ndef f():\n    return "语"\n'),
    ('if 1:\n    try:\n        def f():\n            """d"""\n            pass\n    finally: pass\n',
     "if 1:\n    try:\n        def f():\n            pass\n    finally: pass\n")])
def test_without_docstrings(code, expected):
    assert corpora.without_docstrings(code, ast.parse(code)) in (expected, expected.rstrip("\n"))


def stripped(tree):
    """The tree without docstrings, as a dump; written apart from the code under test."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                node.body = body[1:] or ([] if isinstance(node, ast.Module) else [ast.Expr(ast.Constant(...))])
    return ast.dump(tree)


def test_code_without_docstrings_is_the_same_code(library):
    whole = {d.source: d.text for d in library["source"]}
    bare = {d.source: d.text for d in library["both"] if d not in library["docs"]}
    names = sorted(name for name in bare if len(whole[name]) < 60_000)[::18]
    assert len(names) > 15
    for name in names:
        assert stripped(ast.parse(bare[name])) == stripped(ast.parse(whole[name])), name
    assert sum(map(len, bare.values())) < 0.9 * sum(map(len, whole.values()))


def test_docstrings_are_those_that_python_shows(library):
    """Against the running interpreter's own objects, in a process apart, for modules that are written in Python."""
    names = ["argparse", "textwrap", "statistics", "fractions"]
    code = ("import inspect, json, sys\nfor n in sys.argv[1:]:\n m = __import__(n)\n d = [inspect.getdoc(m)] + [inspect.getdoc(o)"
            " for o in vars(m).values() if inspect.isfunction(o) and o.__module__ == n and o.__doc__]\n print(json.dumps(d))")
    shown = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True).stdout
    texts = {d.source: " ".join(d.text.split()) for d in library["docs"]}
    everything = " ".join(texts.values())
    for name, line in zip(names, shown.splitlines()):
        for doc in json.loads(line):
            for paragraph in doc.split("\n\n"):
                assert " ".join(paragraph.split()) in everything, (name, paragraph)
        assert " ".join(json.loads(line)[0].split("\n\n")[0].split()) in texts[f"python/docs/{name}.py"]


def test_size_and_order(library):
    size = {kind: sum(len(d.text.encode()) for d in documents) for kind, documents in library.items()}
    assert size["docs"] > 1e6 and size["source"] > 5e6 and size["docs"] < size["both"] < size["docs"] + size["source"]
    for documents in library.values():
        names = [d.source for d in documents]
        assert len(set(names)) == len(names)
        assert not [n for n in names if "\\" in n or "/tests/" in n or "site-packages" in n or n.startswith("/")]
    assert list(itertools.islice(corpora.standard_library("docs"), 150)) == library["docs"][:150]
    assert all(len(d.text) >= corpora.SHORTEST for d in library["docs"])


def test_nothing_is_imported():
    code = ("import sys; from pellucid.data.corpora import standard_library; before = set(sys.modules)\n"
            "for d, _ in zip(standard_library('docs'), range(150)): pass\nprint([m for m in set(sys.modules) - before if m.isidentifier() and m[0] != '_'])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"  # sysconfig loads its own data


def test_a_python_without_sources_and_unknown_kinds(tmp_path):
    with pytest.raises(BadInput, match="no standard library as source files") as error:
        corpora.standard_library("docs", tmp_path)
    assert "--corpus DIR" in error.value.next
    with pytest.raises(BadInput, match="did you mean 'docs'"):
        corpora.standard_library("doc")
