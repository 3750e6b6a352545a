"""`pellucid align METHOD` as a person runs it: a model folder, a JSONL of prompts, a reward of ten lines."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import pellucid
from pellucid import events
from pellucid.__main__ import VERBS, main
from pellucid.align.recipes import RECIPES
from pellucid.cli import align, align_methods, base, usage
from pellucid.models import save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, init_weights
from pellucid.tokenizers import train_bpe

METHODS = [name for name in RECIPES if name != "pellucid-grow"]
REWARDS = '''
def short(completions, **columns):
    return [1.0 if len(c[-1]["content"]) < 8 else 0.0 for c in completions]


async def holds(completions, target, **columns):
    return [float(target[i] in c[-1]["content"]) for i, c in enumerate(completions)]


def letters(completions):
    texts = [c[-1]["content"] for c in completions]
    return [sum(x.islower() for x in text) / max(len(text), 1) for text in texts]


def noted(completions, log_extra):
    log_extra("letters", [sum(x.islower() for x in c[-1]["content"]) for c in completions])
    log_extra("said", ["<b>" + c[-1]["content"][:3] for c in completions])
    return [float(len(c[-1]["content"]) % 2) for c in completions]


def broken(completions):
    return [1 / 0 for _ in completions]
'''


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    tok = train_bpe(["What is it? one two three user assistant " * 40, "".join(map(chr, range(32, 127)))], 400)
    spec = DecoderSpec(400, 32, (Layer(Attn(4, 2, 8, Rope(8), qk_norm=True), MLP(48)),) * 2, tied=True, context=500)
    save(init_weights(Decoder(spec), seed=1), folder / "model", tokenizer=tok)
    rows = [{"prompt": [{"role": "user", "content": f"What is it? {i}"}], "target": str(i % 10)} for i in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def run(at: Path, method: str, *argv: str, data: bool = True, out: Path | None = None) -> tuple[int, list[Any]]:
    seen: list[Any] = []
    given = ["--data", str(at / "prompts.jsonl")] if data else []
    small = ["--prompts", "4", "--group", "4", "--max-tokens", "10", "--lr", "0.003", "--problems", "3", "--threads", "1"]
    with events.subscribed(seen.append):
        code = main(["align", method, "--model", str(at / "model"), *given, *small, "--out", str(out or at / f"out-{method}"), *argv])
    return code, seen


def both(at: Path) -> list[str]:
    return ["--reward", f"{at}/rewards.py:short", "--reward", f"digit={at}/rewards.py:holds*0.5"]


# --- every method ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_prompts_and_rewards_of_ones_own(at: Path, method: str, capsys: pytest.CaptureFixture[str]):
    code, seen = run(at, method, *both(at), "--steps", "2")
    assert code == 0, capsys.readouterr().err
    steps = [e for e in seen if e.kind == "step"]
    assert [e.step for e in steps] == [1, 2] and {e.stage for e in steps} == {method}
    for e in steps:
        assert {"reward/short/mean", "reward/digit/mean", "reward/total/mean"} <= e.metrics.keys()
        total = e.metrics["reward/short/mean"] + 0.5 * e.metrics["reward/digit/mean"]  # the weights that were given, no others
        assert e.metrics["reward/total/mean"] == pytest.approx(total)
    graded = [e for e in seen if e.kind == "graded"]
    assert all(e.weights == {"short": 1.0, "digit": 0.5} for e in graded) and {e.completions for e in graded} >= {16}
    (end,) = [e for e in seen if e.kind == "stage_end"]
    assert end.metric == "reward" and 0 <= end.after <= 1.5
    before, after = (pellucid.load(p).embed.weight for p in (at / "model", at / f"out-{method}" / "model"))
    assert not bool((before == after).all())
    log = [json.loads(line) for line in (at / f"out-{method}" / "events.jsonl").read_text().splitlines()]
    assert sum(e["kind"] == "step" for e in log) == 2


def test_the_preset_of_a_method_is_its_name(at: Path):
    for name, verb in VERBS["align"].parts.items():
        function = getattr(__import__(verb.target.split(":")[0], fromlist=["x"]), verb.target.split(":")[1])
        if name in METHODS:
            kind = base.config_class_of(function)
            config = base.parse(kind, ["M", "--group", "4"], f"align {name}")
            assert issubclass(kind, align.Online)
            changes = {"max_tokens": 100} if name == "dr-grpo" else {}
            assert align.settings_of(config, name).objective == pellucid.align.recipe(name, **changes)
    assert set(METHODS) <= set(VERBS["align"].parts)


def test_a_run_learns_what_is_rewarded(at: Path, tmp_path: Path):
    """From noise to letters, also on prompts that it has not seen."""
    code, seen = run(at, "grpo", "--beta", "0", "--reward", f"{at}/rewards.py:letters", "--steps", "20", "--prompts", "8", "--group", "8",
                     "--lr", "0.02", out=tmp_path)
    (end,) = [e for e in seen if e.kind == "stage_end"]
    means = [e.metrics["reward/letters/mean"] for e in seen if e.kind == "step"]
    assert code == 0 and means[0] < 0.3 and sum(means[-5:]) / 5 > 0.6, means
    assert end.after > end.before + 0.2


# --- rewards --------------------------------------------------------------------------------------------------------------


def test_a_reward_that_fails_is_told_and_the_run_goes_on(at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, seen = run(at, "grpo", *both(at), "--reward", f"{at}/rewards.py:broken", "--steps", "2", out=tmp_path)
    assert code == 0
    failed = [e for e in seen if e.kind == "reward_failed"]
    assert failed and {e.reward for e in failed} == {"broken"} and "ZeroDivisionError" in failed[0].traceback
    assert all("reward/short/mean" in e.metrics for e in seen if e.kind == "step")
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_trained_reward_model_grades(at: Path, tmp_path: Path):
    """Its score in the run is the score that transformers computes for the conversation as its own template writes it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"prompt": f"what is {i}", "chosen": "one", "rejected": "two three"}) for i in range(30)))
    assert main(["align", "rm", str(at / "model"), str(pairs), "--out", str(tmp_path / "rm"), "--steps", "8", "--lr", "0.01"]) == 0
    code, seen = run(at, "grpo", "--reward-model", f"taste={tmp_path}/rm/model*2", "--steps", "1", out=tmp_path / "o")
    assert code == 0
    (step,) = [e for e in seen if e.kind == "step"]
    assert step.metrics["reward/total/mean"] == pytest.approx(2 * step.metrics["reward/taste/mean"], rel=1e-6)
    from pellucid.align.prompts import Prompts
    from pellucid.align.reward_scoring import Judge
    from pellucid.align.rollout import Rollouts
    from pellucid.tokenizers import Tokenizer

    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm/model").eval()
    theirs.config.pad_token_id = None  # one conversation at a time: the last token is the last, though it be the one that pads
    tok, policy = Tokenizer.load(str(tmp_path / "rm/model")), Tokenizer.load(str(at / "model"))
    judge = Judge.load(tmp_path / "rm/model", policy)
    assert judge.same
    task = Prompts.open(str(at / "prompts.jsonl"))
    groups = Rollouts(pellucid.load(at / "model"), policy, task, max_tokens=8).sample(task.measured(3), 3, 1.0, 0)
    prompts, ids = [s.prompt for g in groups for s in g], [s.tokens for g in groups for s in g]
    given = judge([""] * 9, [""] * 9, prompts, ids)
    for p, c, score in zip(prompts, ids, given):
        with torch.no_grad():
            assert score == pytest.approx(float(theirs(torch.tensor([p + c])).logits[0, 0]), abs=1e-4)
    judge.same = False  # as if the policy had another tokenizer: through the reward model's own template
    said = judge([[{"role": "user", "content": "what is 3"}]], [[{"role": "assistant", "content": "one"}]], [[1]], [[2]])
    whole, _ = tok.encode_chat([{"role": "user", "content": "what is 3"}, {"role": "assistant", "content": "one"}])
    end = max(i for i, t in enumerate(whole) if t in tok.eos_ids) + 1
    with torch.no_grad():
        assert said[0] == pytest.approx(float(theirs(torch.tensor([whole[:end]])).logits[0, 0]), abs=1e-4)


def test_rewards_stand_beside_a_tasks_own_grades(at: Path, tmp_path: Path):
    code, seen = run(at, "gdpo", "--task", "sorting", "--reward", f"{at}/rewards.py:short", "progress*0.5@format>=1", "--steps", "1",
                     data=False, out=tmp_path)
    assert code == 0
    (graded, *_) = [e for e in seen if e.kind == "graded"]
    assert graded.weights == {"correct": 1.0, "format": 0.2, "progress": 0.5, "short": 1.0}
    (end,) = [e for e in seen if e.kind == "stage_end"]
    assert end.metric == "pass@1"


def test_adapters_are_trained_alone_and_saved_merged_and_apart(at: Path, tmp_path: Path):
    code, _ = run(at, "grpo", *both(at), "--lora", "4", "--steps", "2", out=tmp_path)
    assert code == 0
    given, merged = (dict(pellucid.load(p).named_parameters()) for p in (at / "model", tmp_path / "model"))
    changed = {name for name in given if not bool((given[name] == merged[name]).all())}
    assert changed and not any("norm" in name or "embed" in name for name in changed)
    assert {p.name for p in (tmp_path / "adapters").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_task_of_few_problems_is_measured_on_all_of_them(at: Path, tmp_path: Path):
    notes: list[Any] = []
    with events.subscribed(notes.append):
        assert align.held_out(pellucid.tasks.make("lookup"), 100) < 60 == align.held_out(pellucid.tasks.make("sorting"), 60)
    assert "holds out" in notes[0].text


def test_a_dialogue_with_tools_runs(at: Path, tmp_path: Path):
    code, seen = run(at, "grpo", "--task", "lookup", "--max-tokens", "40", "--tools", "omit", "--steps", "1", data=False, out=tmp_path)
    assert code == 0 and [e.step for e in seen if e.kind == "step"] == [1]


# --- dry run ----------------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_everything_and_trains_nothing(at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, seen = run(at, "ppo", *both(at), "--steps", "5", "--epochs", "2", "--updates", "2", "--dry-run", out=tmp_path / "o")
    out = capsys.readouterr().out
    assert code == 0 and not (tmp_path / "o").exists() and not [e for e in seen if e.kind == "step"]
    for part in ("critic:", "4 prompts x 4 completions = 16 completions", "2 passes x 2 updates = 4 optimizer steps", "80 completions",
                 "weights", "critic", "peak", "short: weight 1", "digit: weight 0.5", "<|im_start|>user", "completion 4", "advantage"):
        assert part in out, part
    trained = re.findall("⟦(.*?)⟧", out)
    (dry,) = [e for e in seen if e.kind == "dry_run"]
    assert len(trained) == 1 + len(dry.examples) == 5 and "im_start" not in "".join(trained[1:])
    for x in dry.examples:
        assert len(x["ids"]) == len(x["mask"]) and sum(x["mask"]) <= 10 and set(x["rewards"]) == {"short", "digit"}


def test_a_dry_run_as_json_is_one_event(at: Path, capsys: pytest.CaptureFixture[str]):
    code, _ = run(at, "grpo", *both(at), "--dry-run", "--json")
    kinds = [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()]
    assert code == 0 and kinds.count("dry_run") == 1


# --- choices ----------------------------------------------------------------------------------------------------------------


def config(*argv: str, kind: type = align_methods.Grpo) -> Any:
    return base.parse(kind, ["M", *argv], "align x")


@pytest.mark.parametrize(("argv", "expected"), [
    (["--beta", "0"], {"beta": 0.0, "kl": "k3-corrected"}), (["--clip-high", "0.28"], {"clip_high": 0.28, "beta": 0.04}),
    (["--advantage", "gdpo", "--set", "whiten=sequence"], {"advantage": "gdpo", "whiten": "sequence"}),
    (["--aggregation", "constant", "--scale", "none"], {"max_tokens": 100, "scale": "none"}),
    (["--recipe", "dapo", "--set", "live_on=any", "truncated=keep"], {"live_on": "any", "truncated": "keep"}),
    (["--entropy", "0.01", "--kl", "k2"], {"entropy_coef": 0.01, "kl": "k2"}), (["--set", "delta=3", "--set", "eps=1e-6"], {"delta": 3, "eps": 1e-6})])
def test_choices_change_the_preset(argv: list[str], expected: dict[str, Any]):
    objective = align.settings_of(config(*argv), "grpo").objective
    assert {name: getattr(objective, name) for name in expected} == expected


def test_choices_of_the_loop():
    settings = align.settings_of(config("--set", "lag=1", "rounds=4", "top_k=9", "--minutes", "2"), "grpo")
    assert (settings.lag, settings.rounds, settings.top_k, settings.steps, settings.seconds) == (1, 4, 9, None, 120)
    assert settings.overlap and not align.settings_of(config("--set", "lag=1", "overlap=false"), "grpo").overlap


def test_a_lag_is_told():
    from pellucid.cli.align_dry import arithmetic, sentences

    for words, told in (((), ""), (("lag=2",), "learned from 2 steps after the weights that drew them, and made beside the update"),
                        (("lag=1", "overlap=false"), "learned from 1 step after the weights that drew them")):
        settings = align.settings_of(config("--set", *words) if words else config(), "grpo")
        lines = [x for x in sentences(settings, arithmetic(settings, None, [5])) if "learned from" in x]
        assert len(lines) == bool(words) and told in "".join(lines) and ("beside" in "".join(lines)) == (words == ("lag=2",))


@pytest.mark.parametrize(("argv", "says"), [
    (["--set", "whitem=token"], "did you mean 'whiten'"), (["--set", "whiten"], "cannot be read"), (["--beta", "1", "--set", "beta=2"], "given twice"),
    (["--set", "lam=0.9"], "no effect"), (["--kl", "k9"], "k9"), (["--group", "1"], "group of 1"), (["--recipe", "gprp"], "did you mean 'grpo'"),
    (["--top-p", "2"], "top_p")])
def test_impossible_choices_are_refused(argv: list[str], says: str):
    with pytest.raises(pellucid.errors.BadInput) as caught:
        align.settings_of(config(*argv), "grpo")
    assert says in f"{caught.value.what} {caught.value.why} {caught.value.next}"


@pytest.mark.parametrize(("argv", "says"), [
    ([], "no reward was given"), (["--reward", "nothing.py:x"], "nothing.py"), (["--reward", "{at}/rewards.py:holds?target2=1"], "target2"),
    (["--reward", "{at}/rewards.py:short", "--task", "sorting"], "both given"), (["--reward", "shrt"], "no reward 'shrt'"),
    (["--reward", "{at}/rewards.py:short", "--set", "dead_groups=drop", "live_on=corect"], "live_on=corect")])
def test_impossible_rewards_are_refused_before_the_run(at: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    code, seen = run(at, "grpo", *[a.format(at=at) for a in argv])
    assert code == 2 and says in capsys.readouterr().err
    assert not [e for e in seen if e.kind in ("step", "evaluation")]


def test_a_reward_that_needs_a_column_that_is_not_there(at: Path, capsys: pytest.CaptureFixture[str]):
    code, _ = run(at, "grpo", "--task", "sorting", "--reward", f"{at}/rewards.py:holds", data=False)
    assert code == 2 and "'target'" in capsys.readouterr().err


# --- the command line itself ------------------------------------------------------------------------------------------------


def test_the_old_command_still_works(at: Path, tmp_path: Path):
    argv = ["align", "grpo", str(at / "model"), "--tasks", "sorting", "copying", "--recipe", "pellucid-grow", "--steps", "1", "--prompts", "2",
            "--group", "2", "--max-tokens", "6", "--problems", "2", "--out", str(tmp_path)]
    assert main(argv) == 0


def test_places_may_be_named_and_lists_given_in_pieces():
    kind = align_methods.Grpo
    for argv in (["M", "--reward", "a", "b"], ["--model", "M", "--reward", "a", "--reward", "b"], ["--reward=a", "--model=M", "--reward", "b"],
                 ["--rewards", "a", "--steps", "3", "--reward", "b", "--model", "M"]):
        parsed = base.parse(kind, argv, "align grpo")
        assert (parsed.model, parsed.reward) == ("M", ("a", "b")) and isinstance(parsed, kind)
    assert base.parse(kind, ["M", "--task", "x", "--tasks", "y"], "align grpo").tasks == ("x", "y")
    from pellucid.cli.align_offline import Dpo

    for argv in (["M", "D"], ["--model", "M", "--data", "D"], ["--data", "D", "M"], ["M", "--data", "D"]):
        parsed = base.parse(Dpo, argv, "align dpo")
        assert (parsed.model, parsed.data) == ("M", "D")


def test_about_forty_options_each_explained_in_two_languages():
    options = usage.options(align_methods.Grpo)
    assert 35 <= len(options) <= 45
    for o in options:
        lines = o.help.splitlines()
        assert any(usage.CHINESE.search(x) for x in lines) and any(not usage.CHINESE.search(x) for x in lines), o.name
    from pellucid.align import ObjectiveConfig
    from pellucid.align.online import OnlineConfig

    fields = {f.name for f in dataclasses.fields(ObjectiveConfig)}
    assert set(align.FLAGS.values()) <= fields and set(align.LOOP) <= {f.name for f in dataclasses.fields(OnlineConfig)}


def test_what_rewards_log_is_shown_beside_the_completions(at: Path, capsys: pytest.CaptureFixture[str]):
    code, seen = run(at, "grpo", "--reward", f"{at}/rewards.py:noted", "--steps", "1", out=at / "noted")
    assert code == 0, capsys.readouterr().err
    (group,) = [e for e in seen if e.kind == "group"]
    for c in group.completions:
        assert c["extra"] == {"letters": sum(x.islower() for x in c["text"]), "said": "<b>" + c["text"][:3]}
    page = (at / "noted" / "report.html").read_text()
    assert f"letters: {group.completions[0]['extra']['letters']}" in page and "said: &lt;b&gt;" in page and "said: <b>" not in page
    assert "update/ratio" in page and "size of an optimizer step beside the weights" in page  # every number, and what it means
    capsys.readouterr()
    assert main(["align", "inspect", str(at / "noted")]) == 0
    shown = capsys.readouterr().out
    assert "letters" in shown and "said" in shown


def test_three_rewards_with_a_conditioned_length_in_one_command(at: Path, capsys: pytest.CaptureFixture[str]):
    """The setting of GDPO's paper: accuracy, format, and a length that counts for right answers only."""
    code, seen = run(at, "gdpo", "--task", "brevity", "--reward", "correct", "format", "length@correct>=1", "--steps", "1", data=False, out=at / "three")
    assert code == 0, capsys.readouterr().err
    (graded, *_) = [e for e in seen if e.kind == "graded" and e.completions == 16]
    assert {k: w for k, w in graded.weights.items() if w} == {"correct": 1.0, "format": 1.0, "length": 1.0}
    assert graded.means["length"] == 0.0 == graded.means["correct"]  # a random model: nothing is right, so no length is rewarded
    (step,) = [e for e in seen if e.kind == "step"]
    assert {"reward/length/mean", "reward/length/informative", "advantage/factor"} <= step.metrics.keys()
