"""The two READMEs: equal in content, true in every path and command, their Python run on a model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pellucid.__main__ import VERBS

ROOT = Path(__file__).parents[2]
READMES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh.md"}


def text_of(lang: str) -> str:
    return READMES[lang].read_text(encoding="utf-8")


def blocks(lang: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text_of(lang), re.S)


def without_comments(code: str) -> list[str]:
    return [line.split("  #")[0].rstrip() for line in code.splitlines()]


@pytest.mark.parametrize("lang", READMES)
def test_every_link_leads_to_a_file(lang: str):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text_of(lang))
    assert len(links) > 40
    assert not [link for link in links if not (ROOT / link).exists()]


def test_both_languages_say_the_same():
    english, chinese = text_of("en"), text_of("zh")
    for pattern in (r"\]\(([^)]+)\)", r"`(pellucid [^`]+)`", r"<!-- [\w-]+ -->", r"^#+ "):
        found = [re.findall(pattern, text, re.M) for text in (english, chinese)]
        if pattern.startswith(r"\]"):
            found = [[link.replace(".zh.md", ".md") for link in links] for links in found]
        if "pellucid" in pattern:
            found = [[c.replace("动词", "VERB") for c in commands] for commands in found]
        assert found[0] == found[1]
    for kind in ("sh", "python"):
        code = [[without_comments(block) for block in blocks(lang, kind)] for lang in READMES]
        assert code[0] == code[1]
    rows = [len(re.findall(r"^\|", text, re.M)) for text in (english, chinese)]
    assert rows[0] == rows[1] and english.count("| planned") == chinese.count("| 计划中")


def test_every_command_exists_and_every_verb_is_named():
    commands = re.findall(r"^\| `pellucid ([^`]+)`", text_of("en"), re.M)
    named = {command.split()[0]: command.split() for command in commands}
    assert set(named) == set(VERBS)
    for command in commands + re.findall(r"^pellucid (.*)", "\n".join(blocks("en", "sh")), re.M):
        verb, *rest = command.split()
        assert not VERBS[verb].parts or rest[0] in VERBS[verb].parts, command


def test_the_python_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    import pellucid
    from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
    from pellucid.tokenizers import train_bpe

    tokenizer = train_bpe(["make 15 from 2, 13, 14. The quick brown fox jumps over the lazy dog. " * 3], 370)
    layer = Layer(Attn(2, 1, 16, Rope(16, 10_000.0), qk_norm=True), MLP(64))
    model = init_weights(
        Decoder(DecoderSpec(tokenizer.vocab_size, 32, (layer,), tied=True, context=256, family="qwen3")), 0
    )
    pellucid.save(model, tmp_path / "runs" / "grow" / "model", tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks("en", "python"):
        exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (1, names["tokens"].shape[1], tokenizer.vocab_size)  # type: ignore[attr-defined]
    assert (tmp_path / "runs" / "copy" / "model.safetensors").exists()
    assert len(capsys.readouterr().out.splitlines()) >= 3
