"""The report, read back by parsers that are not ours (html.parser, ElementTree): whole, holed, nonsensical, hostile."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import report as full_report

from pellucid.grow import charts, report_sections
from pellucid.grow.charts import Series
from pellucid.grow.report import render, write

VOID = {"meta", "link", "br", "img", "hr", "input"}
TAGS = {
    "html",
    "head",
    "meta",
    "link",
    "title",
    "style",
    "script",
    "body",
    "main",
    "div",
    "span",
    "b",
    "small",
    "button",
    "h1",
    "h2",
    "h3",
    "p",
    "section",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "a",
    "figure",
    "figcaption",
    "svg",
    "line",
    "text",
    "tspan",
    "path",
    "circle",
    "rect",
    "g",
    "ul",
    "li",
    "i",
    "dl",
    "dt",
    "dd",
    "pre",
    "code",
    "header",
    "details",
    "summary",
}


class Page(HTMLParser):
    """The page as (tags with attributes), the text that each language shows, and its scripts; nesting must be exact."""

    def __init__(self, markup: str):
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {"en": [], "zh": []}
        self.scripts: list[str] = []
        self.feed(markup)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> inside {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self.open]
        if "script" in inside:
            self.scripts.append(data)
        elif "style" not in inside and "head" not in inside and "button" not in inside:
            for language, other in (("en", "zh"), ("zh", "en")):
                if other not in (kind for _, kind in self.open):
                    self.text[language].append(data)

    def shows(self, language: str) -> str:
        return " ".join(" ".join(self.text[language]).split())


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return full_report()


@pytest.fixture(scope="module")
def page(report: dict[str, Any]) -> Page:
    return Page(render(report, "en"))


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_the_headline_carries_the_numbers(page: Page):
    english, chinese = page.shows("en"), page.shows("zh")
    for number in ("7.9", "1.05 M", "2.12", "2.44", "38.5% → 63.2%", "3.2", "1.5"):
        assert number in english.split("Stage by stage")[0], number
        assert number in chinese.split("逐个阶段")[0], number
    assert (
        "(byte 5-gram: 2.44)" in english
        and "3.2× smaller at 1.5× the speed" in english
        and "缩小到 1/3.2 ，" in chinese
    )
    assert "+24.7 points" in english and "+24.7 个百分点" in chinese


def test_every_stage_has_its_row_with_a_link_to_its_source(page: Page, report: dict[str, Any]):
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links == {f"https://github.com/pellucid/pellucid/blob/main/{s['file']}" for s in report["stages"]}
    text = page.shows("en")
    for s in report["stages"]:
        assert s["file"] in text
        assert f"{s['seconds_planned']:.0f} s" in text or f"{s['seconds_planned']:.1f} s" in text
        assert f"{s['memory_predicted_bytes'] / 2**20:.0f} MiB" in text
    assert "8.12 bpb → 2.12 bpb" in text.replace("  ", " ") and "97.5%" in text


def test_only_what_got_better_wears_the_accent(report: dict[str, Any]):
    table = re.findall(
        r"<tr><td>.*?</tr>", re.search(r'<table class="stages">.*?</table>', render(report, "en"), re.S)[0], re.S
    )
    marked = {s["stage"]: '<b class="accent">' in row for s, row in zip(report["stages"], table, strict=True)}
    assert marked == {
        "tokenizer": True,
        "pretrain": True,
        "sft": True,
        "grpo": True,
        "quantize": False,
        "evaluate": True,
        "tools": False,
    }


def test_each_language_is_whole_and_alone(page: Page):
    assert not re.search(r"[\u4e00-\u9fff]", page.shows("en"))
    counts = [sum((attrs.get("class") or "") == language for _, attrs in page.tags) for language in ("en", "zh")]
    assert counts[0] == counts[1] > 80
    assert "留出" in page.shows("zh") and "held-out" not in page.shows("zh").replace("held-outs", "")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_it_opens_in_the_language_asked_for(report: dict[str, Any], lang: str):
    assert render(report, lang).startswith(f'<!doctype html>\n<html lang="{lang}">')


def test_an_unknown_language_is_refused(report: dict[str, Any]):
    with pytest.raises(ValueError, match="fr"):
        render(report, "fr")


def test_the_page_asks_for_nothing_and_runs_only_its_own_lines(page: Page, report: dict[str, Any]):
    markup = render(report, "en")
    assert not re.search(r"@import|url\(|<iframe|<object|<base", markup)
    assert all(attrs.get("href") == "data:," for tag, attrs in page.tags if tag == "link")
    assert not any("src" in attrs for _, attrs in page.tags)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert len(page.scripts) == 1 and policy is not None
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_a_group_stands_from_best_to_worst_with_equal_answers_once(report: dict[str, Any]):
    group = report["groups"][0]
    row = re.findall(r"<tr><td><pre>.*?</tr>", report_sections._group(group), re.S)
    shown = [float(re.search(r'<td class="n \w+">(.*?)</td>', r)[1].replace("\u2212", "-")) for r in row]
    distinct = {(s["completion"], s["advantage"]) for s in group["samples"]}
    assert len(row) == len(distinct) < len(group["samples"])
    assert shown == sorted((round(a, 2) for _, a in distinct), reverse=True)
    copies = sum(int(n) - 1 for r in row for n in re.findall(r"×(\d+)", r))
    assert len(row) + copies == len(group["samples"])
    for r, value in zip(row, shown):
        assert (
            f'<rect class="{"up" if value > 0 else "down"}"' in r
            and f'class="n {"plus" if value > 0 else "minus"}"' in r
        )


def test_rewards_are_coloured_by_their_value(report: dict[str, Any]):
    chips = Page(report_sections.chips({"format": 1.0, "correct": 0.0, "progress": 0.5, "odd": None, "text": "1"}))
    kinds = [attrs["class"] for tag, attrs in chips.tags if tag == "span" and "chip" in (attrs.get("class") or "")]
    assert kinds == ["chip up", "chip down", "chip "]


def test_a_thought_is_told_from_an_answer():
    for text, thought, said in (
        ("<think>\na\n</think>\n\n7", "<think>\na\n</think>", "\n\n7"),
        ("<think>\nno end", "<think>\nno end", ""),
    ):
        assert report_sections.model_text(text) == (
            f'<pre><span class="thought">{charts.escaped(thought)}</span><span class="said">{said}</span></pre>'
        )
    assert report_sections.model_text("junk") == "<pre>junk</pre>"


def test_a_given_checkpoint_does_not_grow_from_raw_text(report: dict[str, Any]):
    started = copy.deepcopy(report)
    started["stages"] = [s for s in started["stages"] if s["stage"] not in ("tokenizer", "pretrain")]
    del started["baselines"]
    text = Page(render(started, "en")).shows("en")
    assert "a checkpoint of 1.05 M parameters learned the tasks" in text and "raw text" not in text


# --- holes, nonsense and hostile text --------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside; of long lists the first two and the last."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    items = list(items)
    for key, inner in items if isinstance(value, dict) else [*items[:2], *items[-1:]]:
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def small_report() -> dict[str, Any]:
    """The fixture with short curves and one of everything, so that hundreds of pages are made in seconds."""
    report = full_report()
    for s in report["stages"]:
        s["curves"] = {k: [*v[:2], v[-1]] for k, v in s["curves"].items()}
    report["prompts"], report["groups"] = report["prompts"][:1], report["groups"][:1]
    report["stages"] = [s for s in report["stages"] if s["stage"] in ("pretrain", "grpo", "quantize")]
    return report


SMALL = small_report()
KINDS = list({tuple(0 if isinstance(key, int) else key for key in path): path for path in places(SMALL)}.values())


def test_any_key_may_be_missing():
    for path in [p for p in KINDS if isinstance(p[-1], str)]:
        holed = copy.deepcopy(SMALL)
        del at(holed, path[:-1])[path[-1]]
        Page(render(holed, "en"))


@pytest.mark.parametrize("nothing", [None, math.inf, 0, -1.0])
def test_any_number_may_be_nonsense(nothing: Any):
    for path in [p for p in KINDS if isinstance(at(SMALL, p), (int, float))]:
        odd = copy.deepcopy(SMALL)
        at(odd, path[:-1])[path[-1]] = nothing
        markup = render(odd, "zh")
        Page(markup)
        assert not re.search(r'="[^"]*\b(nan|inf)\b', markup), path


def test_nothing_at_all_is_a_page():
    text = Page(render({}, "en")).shows("en")
    assert len(text) < 100
    assert Page(
        render(
            {"stages": [{}], "prompts": [{}], "groups": [{}], "plan": {}, "tools": {}, "evaluation": {"sft": {}}}, "zh"
        )
    )


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></div></main>",
    "' onmouseover='x",
    "a\x00\x1b[31m\ud800b",
    "\u202egnp.exe",
    "&lt;b&gt;",
    "javascript:alert(1)",
    "$body ${lang} $$",
    "]]>--><!--",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_never_becomes_more_than_text(text: str):
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            inner = {key: poisoned(v) for key, v in value.items()}
            return inner | dict(zip([text], inner.values()))  # names come from outside as well
        if isinstance(value, list):
            return [poisoned(inner) for inner in value]
        return text if isinstance(value, str) else value

    kept = {"stage", "role", "file"}  # also with these as they are, so that every section is reached

    def mostly(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v if k in kept and isinstance(v, str) else mostly(v) for k, v in value.items()}
        return [mostly(v) for v in value] if isinstance(value, list) else text if isinstance(value, str) else value

    for report in (poisoned(SMALL), mostly(SMALL)):
        markup = render(report, "en")
        page = Page(markup)
        assert {tag for tag, _ in page.tags} <= TAGS
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
        assert len(page.scripts) == 1
        assert all(a["href"].startswith("https://github.com/pellucid/") for tag, a in page.tags if tag == "a")
        assert "\x00" not in markup and "\x1b" not in markup
        markup.encode("utf-8")
        if text.isprintable():
            assert text in page.shows("en")


@pytest.mark.parametrize(
    "file", ["../../etc/passwd x", "https://example.org/", "a b", "//x.org", 'a"b', "", None, 3, "src/a.py\n"]
)
def test_only_a_plain_path_becomes_a_link(file: Any):
    page = Page(render({"stages": [{"stage": "sft", "file": file}]}, "en"))
    assert not [tag for tag, _ in page.tags if tag == "a"]


# --- the files -------------------------------------------------------------------------------------------------------


def test_write_leaves_both_files_and_the_json_is_the_report(tmp_path: Path, report: dict[str, Any]):
    write(report, tmp_path, "zh")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(report, "zh")


def test_what_json_cannot_hold_is_written_as_null_or_escaped(tmp_path: Path):
    write({"name": "\ud800中", "minutes_spent": math.nan}, tmp_path, "en")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == {
        "name": "\ud800中",
        "minutes_spent": None,
    }


def test_a_page_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write({"name": "first"}, tmp_path, "en")
    before = (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError):
        write({"name": "second"}, tmp_path, "fr")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_the_transformers_snippet_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The page's Python on a tiny random model that pellucid wrote."""
    import html

    import pellucid
    from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
    from pellucid.tokenizers import train_bpe

    tokenizer = train_bpe(["make 15 from 2, 13, 14. The quick brown fox jumps over the lazy dog. " * 3], 370)
    layer = Layer(Attn(2, 1, 16, Rope(16, 10_000.0), qk_norm=True), MLP(64))
    model = init_weights(
        Decoder(DecoderSpec(tokenizer.vocab_size, 32, (layer,), tied=True, context=256, family="qwen3")), 0
    )
    pellucid.save(model, tmp_path / "it's" / "model", tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    page = report_sections.going_on({"command": 'pellucid grow --out "it\'s"', "model": "model"})
    shell, code = [html.unescape(block) for block in re.findall(r'<pre class="code">(.*?)</pre>', page, re.S)]
    assert shell == "pellucid chat 'it'\"'\"'s/model'\npellucid serve 'it'\"'\"'s/model'"
    exec(compile(code, "snippet", "exec"), {})
    assert "Make 26 from 4,12,18." in capsys.readouterr().out


# --- charts ----------------------------------------------------------------------------------------------------------


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def percent(text: str | None) -> float:
    assert text is not None and text.endswith("%")
    return float(text[:-1])


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_enclose_the_range_at_equal_round_steps(low: float, width: float):
    marks = charts.ticks(low, low + width)
    slack = 1e-6 * max(abs(low), width, 1e-9)
    assert 2 <= len(marks) <= 6
    assert marks[0] <= low + slack and marks[-1] >= low + width - slack
    step = marks[1] - marks[0]
    assert all(math.isclose(b - a, step, rel_tol=1e-6, abs_tol=1e-9 * abs(low)) for a, b in pairwise(marks))
    if width > max(1e-3 * abs(low), 1e-9):
        assert any(
            math.isclose(step / 10 ** math.floor(math.log10(step) + 1e-9), m, rel_tol=1e-6) for m in (1, 2, 2.5, 5)
        )
        assert marks[-1] - marks[0] <= 2.6 * width + 2 * step


def test_a_curve_passes_through_its_points():
    points = [(0.0, 1.0), (0.5, 3.0), (1.0, 2.0)]
    svg = drawn(charts.curves([Series(points, dots=True)]))
    labels = {t.text: float(t.get("y", "0")) - 4 for t in svg.iter("text") if t.get("x") == "-8"}
    (low, y_low), *_, (high, y_high) = sorted((float(k), y) for k, y in labels.items())
    assert (y_low, y_high) == (charts.HEIGHT, 0)
    for (x, value), dot in zip(points, [c for c in svg.iter("circle") if c.get("class") == "dot s0"], strict=True):
        assert percent(dot.get("cx")) == pytest.approx(100 * x)
        assert float(dot.get("cy")) == pytest.approx(y_low + (value - low) * (y_high - y_low) / (high - low), abs=0.1)
    path = next(svg.iter("path")).get("d", "")
    corners = [tuple(map(float, pair.split())) for pair in path[1:].split("L")]
    assert [x for x, _ in corners] == [0, 500, 1000] and corners[1][1] < corners[2][1] < corners[0][1]


def test_the_pointer_reads_true_values_everywhere():
    points = [(i / 500, math.sin(i / 50)) for i in range(501)]
    svg = drawn(charts.curves([Series(points), Series([(0.0, 0.25), (1.0, 0.75)], 1)]))
    bands = [g for g in svg.iter("g") if g.get("class") == "band"]
    edges = [(percent(g.find("rect").get("x")), percent(g.find("rect").get("width"))) for g in bands]
    assert 20 < len(bands) <= 60 and edges[0][0] == 0
    assert all(x + w == pytest.approx(following, abs=0.02) for (x, w), (following, _) in pairwise(edges))
    assert edges[-1][0] + edges[-1][1] == pytest.approx(100, abs=0.02)
    told = [g.find("title").text for g in bands]
    assert told[0] == "0%: 0.00 · 0.25" and all(" · " in t for t in told)
    for text, (x, w) in zip(told, edges):
        assert float(text.split(": ")[1].split(" · ")[0]) == pytest.approx(math.sin(10 * (x + w / 2) / 100), abs=0.1)


def test_what_cannot_be_drawn_is_left_out():
    assert charts.curves([Series([(0, math.nan), (1, None)])]) == charts.curves([]) == ""  # type: ignore[list-item]
    svg = drawn(charts.curves([Series([(0, 1.0), (0.5, math.inf), (1, 1.0)])]))  # flat, with a hole
    assert "nan" not in ElementTree.tostring(svg, "unicode") and "inf" not in ElementTree.tostring(
        svg, "unicode"
    ).replace("infor", "")
    assert charts.bars([("a", math.nan, True)]) == charts.grouped([], {}) == charts.divided([]) == ""


def test_bars_are_as_long_as_their_values():
    svg = drawn(charts.bars([("gzip", 4.0, False), ("xz", 3.0, False), ("model", 1.0, True)]))
    widths = [percent(r.get("width")) for r in svg.iter("rect") if r.get("class") != "track"]
    assert widths == [100, 75, 25]
    assert [g.get("class") for g in svg if g.tag == "g"] == ["peer", "peer", "ours"]


def test_grouped_bars_keep_their_colours_order_and_heights():
    svg = drawn(
        charts.grouped(
            [("a", {"sft": 0.5, "int8": 1.0}), ("b", {"sft": 0.25, "unknown": 1.0})], {"sft": 1, "grpo": 2, "int8": 3}
        )
    )
    rects = list(svg.iter("rect"))
    assert [r.get("class") for r in rects] == ["k1", "k3", "k1"]
    heights = [float(r.get("height")) for r in rects]
    assert heights[0] / heights[1] == pytest.approx(0.5, abs=0.01) and heights[2] / heights[1] == pytest.approx(
        0.25, abs=0.01
    )
    xs = [percent(r.get("x")) for r in rects]
    assert 0 < xs[0] < xs[1] < 50 < xs[2] < 100


def test_a_divided_bar_is_to_scale():
    svg = drawn(charts.divided([("spent", [("a", 30.0), ("b", 10.0)]), ("planned", [("a", 20.0), ("b", 0.0)])]))
    rects = [(r.get("class"), percent(r.get("x")), percent(r.get("width"))) for r in svg.iter("rect")]
    assert rects == [("p0", 0, 75), ("p1", 75, 25), ("p0", 0, 50)]


def test_the_balance_leans_to_the_sign():
    up, down, none = (drawn(charts.balance(v, 2.0)).find("rect") for v in (2.0, -1.0, 0.0))
    assert (up.get("class"), up.get("x"), up.get("width")) == ("up", "50.00%", "50.00%")
    assert (down.get("class"), down.get("x"), down.get("width")) == ("down", "25.00%", "25.00%")
    assert none.get("width") == "0.00%"
