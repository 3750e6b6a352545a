"""Loss, gradient of every parameter, advantages and metrics against trl's GRPOTrainer on a tiny Qwen2, on the CPU.

trl samples, scores and computes its own loss. Inside its `_compute_loss` we recompute the log-probabilities from the
plain model and put them through our objective. Two optimizer steps on one rollout: the second is off-policy. Two
micro-batches per step with completions of unequal length, so that a wrong normaliser shows.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
pytest.importorskip("trl", reason="optional reference: pip install pellucid[parity]")

from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from pellucid.align import ObjectiveConfig, assign_credit, count, objective_padded, recipe
from pellucid.align.aggregation import Counts
from pellucid.align.head import entropy_rows
from pellucid.align.policy_losses import high_entropy_tokens
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

G, LONGEST, MICRO_BATCH = 4, 10, 8
WEIGHTS = {"even": 1.0, "long": 0.5}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklm"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A tiny untied Qwen2 whose distribution is far from uniform (head x 8), saved: trl re-reads the reference."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    path = tmp_path_factory.mktemp("qwen2")
    model.save_pretrained(path)
    return str(path)


def even(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def long(completion_ids, **_):
    return [float(len(ids) >= 6) for ids in completion_ids]


def trainer_of(folder, tokenizer, out, options, kind=GRPOTrainer, config=GRPOConfig):
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    args = config(**dict(
        output_dir=str(out), use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, save_strategy="no",
        report_to=[], max_steps=2, seed=3, learning_rate=2e-2, lr_scheduler_type="constant", logging_steps=1,
        disable_tqdm=True, per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=2,
        steps_per_generation=2, num_iterations=2, num_generations=G, max_completion_length=LONGEST, temperature=0.7,
        reward_weights=list(WEIGHTS.values()),
    ) | options)
    data = Dataset.from_dict({"prompt": ["ab", "cdef", "gh", "ijklm"]})
    trainer = kind(model, reward_funcs=[even, long], args=args, train_dataset=data, processing_class=tokenizer)
    if trainer.ref_model is not None:
        with torch.no_grad():
            trainer.ref_model.lm_head.weight.mul_(0.9)  # a reference equal to the policy would hide the KL term
    return trainer


def token_logprobs(model, inputs, temperature, entropy=False):
    """log softmax(logits / temperature) at the sampled completion tokens, (B, T), written out; and the entropies."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    first = inputs["prompt_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=attention).logits[:, first - 1 : -1] / temperature
    logp = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    return (logp, entropy_rows(logits)) if entropy else logp


class Compare:
    """Wraps three methods of a trainer and keeps, per call of its loss, both sides."""

    def __init__(self, trainer, cfg: ObjectiveConfig):
        self.trainer, self.cfg, self.calls = trainer, cfg, []
        self._rewards, self._score, self._loss = (
            trainer._calculate_rewards, trainer._generate_and_score_completions, trainer._compute_loss)
        trainer._calculate_rewards = self.calculate_rewards
        trainer._generate_and_score_completions = self.score
        trainer._compute_loss = self.compute_loss
        trainer.train()

    def calculate_rewards(self, *args):
        self.rewards = self._rewards(*args)
        return self.rewards

    def score(self, inputs):
        rollout = self._score(inputs)
        lengths = rollout["completion_mask"].sum(1)
        self.counts, self.lengths = count(lengths, "count"), lengths
        columns = dict(zip(WEIGHTS, self.rewards.double().unbind(1)))
        credit = assign_credit({name: r.view(-1, G) for name, r in columns.items()}, lengths.clamp(min=1).view(-1, G), self.cfg,
                               weights=WEIGHTS)
        torch.testing.assert_close(credit.advantages.flatten(), rollout["advantages"], atol=2e-6, rtol=0)
        assert rollout["advantages"].std() > 0.1 and lengths.unique().numel() > 2, "vacuous rollout"
        return rollout

    def compute_loss(self, model, inputs):
        loss = self._loss(model, inputs)
        named = dict(model.named_parameters())
        theirs = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        logp, entropy = token_logprobs(model, inputs, self.trainer.args.temperature, entropy=True)
        mask, old = inputs["completion_mask"], inputs.get("old_per_token_logps")
        keep = None
        if self.cfg.high_entropy < 1:  # trl: the quantile of this micro-batch
            keep = torch.zeros_like(mask, dtype=torch.bool)
            keep[mask.bool()] = high_entropy_tokens(entropy[mask.bool()], self.cfg.high_entropy)
        ref = inputs.get("ref_per_token_logps")
        if ref is not None:  # our own, from the same reference weights
            with torch.no_grad():
                ref = token_logprobs(self.trainer.ref_model, inputs, self.trainer.args.temperature)
        mine, metrics = objective_padded(logp, old, ref, inputs["advantages"], mask, self.cfg, self.counts, entropy=entropy,
                                         sampler=logp.detach() if old is None else old, keep=keep)
        ours = torch.autograd.grad(mine, list(named.values()))
        self.calls.append(dict(
            loss=(mine.item(), loss.item()), grads={n: (a, b) for n, a, b in zip(named, ours, theirs)},
            metrics={k: float(v) for k, v in metrics.items()}, tokens=int(inputs["completion_mask"].sum()),
            had_old="old_per_token_logps" in inputs,
            theirs={k: v[-1] for k, v in self.trainer._metrics["train"].items() if v},
        ))
        return loss

    def check(self, calls=4):
        assert len(self.calls) == calls
        for call in self.calls:
            assert call["loss"][0] == pytest.approx(call["loss"][1], abs=2e-6, rel=2e-6)
            size = max(float(b.abs().max()) for _, b in call["grads"].values())
            assert size > 1e-3, "vacuous: no gradient"
            for name, (a, b) in call["grads"].items():
                assert float((a - b).abs().max()) <= 2e-6 * max(1.0, size), name
            if self.cfg.ratio == "token" and self.cfg.policy == "clip":  # our shares of the step -> means of this micro-batch, which is what trl logs
                scale = self.counts.tokens / call["tokens"]
                for side in ("low", "high"):
                    theirs = call["theirs"][f"clip_ratio/{side}_mean"]
                    assert call["metrics"][f"clip/{side}"] * scale == pytest.approx(theirs, abs=1e-6)
        return self.calls


CASES = {
    # name: (options of trl, our configuration)
    "grpo": (dict(loss_type="grpo"), dict(aggregation="sequence-mean", empty="count")),
    "bnpo": (dict(loss_type="bnpo"), dict(aggregation="token-mean-local", empty="count")),
    "dr_grpo": (dict(loss_type="dr_grpo", scale_rewards="none"),
                dict(aggregation="constant", scale="none", max_tokens=LONGEST, empty="count")),
    "dapo": (dict(loss_type="dapo"), dict(aggregation="token-mean")),
}
KL = {
    "no-kl": (dict(beta=0.0), dict()),
    "k3-corrected": (dict(beta=0.04, use_bias_correction_kl=True), dict(beta=0.04, kl="k3-corrected")),
    "k3": (dict(beta=0.04, use_bias_correction_kl=False), dict(beta=0.04, kl="k3")),
}


def run(folder, tokenizer, out, options, choices):
    return Compare(trainer_of(folder, tokenizer, out, options), ObjectiveConfig(**choices))


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("loss_type", CASES)
def test_loss_types(folder, tokenizer, tmp_path, loss_type, kl):
    (options, choices), (kl_options, kl_choices) = CASES[loss_type], KL[kl]
    calls = run(folder, tokenizer, tmp_path, options | kl_options, choices | kl_choices).check()
    first, second = calls[0]["metrics"], calls[2]["metrics"]
    assert first["kl/old_k3"] < 1e-9 and second["kl/old_k3"] > 1e-3, "the second step must be off-policy"
    if kl == "k3":
        for call in calls:
            scale = sum(c["tokens"] for c in calls[:2]) / call["tokens"]
            assert call["metrics"]["kl/ref_k3"] * scale == pytest.approx(call["theirs"]["kl"], rel=1e-4)
            assert call["theirs"]["kl"] > 1e-4
    assert sum(c["metrics"]["clip/low"] + c["metrics"]["clip/high"] for c in calls[2:]) > 0.02, "nothing was clipped"


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_gspo(folder, tokenizer, tmp_path, loss_type):
    """A wide clip: with the paper's, the second step would be clipped to a gradient of zero on both sides."""
    options = dict(importance_sampling_level="sequence", epsilon=0.9, epsilon_high=2.0, beta=0.04)
    choices = dict(ratio="sequence", clip_low=0.9, clip_high=2.0, beta=0.04, kl="k3-corrected")
    calls = run(folder, tokenizer, tmp_path, CASES[loss_type][0] | options, CASES[loss_type][1] | choices).check()
    assert calls[2]["metrics"]["kl/old_k3"] > 1e-3


def test_asymmetric_two_sided_clip(folder, tokenizer, tmp_path):
    options = dict(loss_type="dapo", epsilon=0.1, epsilon_high=0.28, delta=1.5)
    calls = run(folder, tokenizer, tmp_path, options,
                dict(aggregation="token-mean", clip_low=0.1, clip_high=0.28, delta=1.5)).check()
    for name in ("clip/low", "clip/high", "clip/delta"):
        assert sum(c["metrics"][name] for c in calls[2:]) > 0, name


def test_batch_scale_without_old_logprobs(folder, tokenizer, tmp_path):
    """One update per rollout: trl leaves the old log-probabilities out, we take old=None."""
    options = dict(loss_type="grpo", scale_rewards="batch", num_iterations=1)
    calls = run(folder, tokenizer, tmp_path, options, dict(scale="batch", empty="count")).check()
    assert not any(c["had_old"] for c in calls)


def test_masked_truncated_completions(folder, tokenizer, tmp_path):
    """trl's `grpo` counts fully masked completions as zeros: our empty="count"; "exclude" would differ."""
    options = dict(loss_type="grpo", mask_truncated_completions=True)
    pair = run(folder, tokenizer, tmp_path, options, dict(empty="count"))
    pair.check()
    assert 0 < int((pair.lengths == 0).sum()) < len(pair.lengths)
    assert count(pair.lengths, "exclude").sequences < pair.counts.sequences


VARIANTS = {  # trl's epsilon_high is CISPO's cap itself; ours is 1 + clip_high
    "cispo": (dict(loss_type="cispo", epsilon_high=2.0), dict(policy="cispo", clip_low=1.0, clip_high=1.0,
                                                              aggregation="token-mean")),
    "sapo": (dict(loss_type="sapo"), dict(policy="sapo", empty="count")),
    "luspo": (dict(loss_type="luspo", importance_sampling_level="sequence", epsilon=0.9, epsilon_high=2.0),
              dict(ratio="sequence", clip_low=0.9, clip_high=2.0, aggregation="sequence-sum", empty="count")),
    "gdpo": (dict(loss_type="dapo", multi_objective_aggregation="normalize_then_sum"),
             dict(advantage="gdpo", whiten="sequence", aggregation="token-mean")),
    "off-policy mask": (dict(loss_type="dapo", off_policy_mask_threshold=0.02), dict(off_policy=0.02, aggregation="token-mean")),
    "high entropy": (dict(loss_type="dapo", top_entropy_quantile=0.4), dict(high_entropy=0.4, aggregation="token-mean")),
}


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(folder, tokenizer, tmp_path, name, beta):
    options, choices = VARIANTS[name]
    calls = run(folder, tokenizer, tmp_path, options | dict(beta=beta),
                choices | (dict(beta=beta, kl="k3-corrected") if beta else {})).check()
    if name == "cispo":
        assert sum(c["metrics"]["clip/high"] for c in calls[2:]) > 0, "nothing was capped"
    if name in ("off-policy mask", "high entropy"):
        assert 0.05 < calls[2]["metrics"]["correction/dropped"] + calls[3]["metrics"]["correction/dropped"] < 0.95


def test_entropy_bonus(folder, tokenizer, tmp_path):
    """trl averages over the tokens of a micro-batch, we over those of the step: the same with one micro-batch a step."""
    one = dict(loss_type="dapo", entropy_coef=0.05, per_device_train_batch_size=2 * MICRO_BATCH, gradient_accumulation_steps=1,
               steps_per_generation=1)
    calls = run(folder, tokenizer, tmp_path, one, dict(aggregation="token-mean", entropy_coef=0.05)).check(2)
    with_out = run(folder, tokenizer, tmp_path, one | dict(entropy_coef=0.0), dict(aggregation="token-mean")).check(2)
    assert abs(calls[0]["loss"][1] - with_out[0]["loss"][1]) > 1e-3


def test_gmpo(folder, tokenizer, tmp_path):
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    options = dict(epsilon=0.1, epsilon_high=0.15, beta=0.04, use_bias_correction_kl=False)
    trainer = trainer_of(folder, tokenizer, tmp_path, options, GMPOTrainer, GMPOConfig)
    cfg = ObjectiveConfig(policy="gmpo", clip_low=0.1, clip_high=0.15, beta=0.04, kl="k3", empty="count")
    calls = Compare(trainer, cfg).check()
    assert sum(c["metrics"]["clip/low"] + c["metrics"]["clip/high"] for c in calls[2:]) > 0.02, "nothing was clipped"


@pytest.mark.parametrize("clip, normalise", [(None, False), (0.6, True)])
def test_rloo(folder, tokenizer, tmp_path, clip, normalise):
    """Reward clip, then the KL of the whole answer inside the reward, then the leave-one-out baseline; sequence ratio."""
    from trl import RLOOConfig, RLOOTrainer

    options = dict(beta=0.05, reward_clip_range=(-clip, clip) if clip else None, normalize_advantages=normalise,
                   gradient_accumulation_steps=1, steps_per_generation=1, per_device_train_batch_size=2 * MICRO_BATCH, epsilon=0.3)
    trainer = trainer_of(folder, tokenizer, tmp_path, options, RLOOTrainer, RLOOConfig)
    cfg = recipe("rloo", clip_low=0.3, clip_high=0.3, reward_clip=clip, whiten="sequence" if normalise else "none")
    pair = CompareRLOO(trainer, cfg)
    calls = pair.check(2)
    assert calls[1]["metrics"]["ratio/max"] > 1.05, "the second step must be off-policy"


class CompareRLOO(Compare):
    """trl keeps only the old log-probability of whole answers, and that is all that the ratio of an answer needs."""

    def score(self, inputs):
        rollout = self._score(inputs)
        mask, lengths = rollout["completion_mask"], rollout["completion_mask"].sum(1)
        with torch.no_grad():
            args = (rollout, self.trainer.args.temperature)
            logp, ref = token_logprobs(self.trainer.model, *args), token_logprobs(self.trainer.ref_model, *args)
        kl = ((logp - ref) * mask).sum(1).view(-1, G)
        columns = {n: r.view(-1, G) for n, r in zip(WEIGHTS, self.rewards.double().unbind(1))}
        credit = assign_credit(columns, lengths.view(-1, G), self.cfg, weights=WEIGHTS, kl=kl)
        torch.testing.assert_close(credit.advantages.flatten(), rollout["advantages"], atol=3e-6, rtol=1e-6)
        assert rollout["advantages"].std() > 0.1 and kl.std() > 0.1
        self.counts = credit.counts
        return rollout

    def compute_loss(self, model, inputs):
        whole = torch.zeros_like(inputs["completion_mask"], dtype=torch.float32)
        whole[:, 0] = inputs["old_logps"]
        return super().compute_loss(model, inputs | {"old_per_token_logps": whole})


def test_trl_default_is_what_the_trainer_does_untouched(folder, tokenizer, tmp_path):
    trainer = trainer_of(folder, tokenizer, tmp_path, {})
    Compare(trainer, recipe("trl-default")).check()


def test_the_comparison_can_fail(folder, tokenizer, tmp_path, monkeypatch):
    """Each wrong objective is told apart from trl's by far more than the tolerance."""
    pair = run(folder, tokenizer, tmp_path, dict(loss_type="dapo", epsilon=0.1, epsilon_high=0.28),
               dict(aggregation="token-mean", clip_low=0.1, clip_high=0.28))
    pair.check()
    inputs = copy.copy(pair.trainer._buffered_inputs[0])
    model = pair.trainer.model
    model.train()
    loss = pair._loss(model, inputs).item()

    def ours(temperature=0.7, counts=pair.counts, **choices):
        cfg = ObjectiveConfig(**(dict(aggregation="token-mean", clip_low=0.1, clip_high=0.28) | choices))
        logp = token_logprobs(model, inputs, temperature)
        return objective_padded(logp, inputs["old_per_token_logps"], None, inputs["advantages"],
                                inputs["completion_mask"], cfg, counts)[0].item()

    local = int(inputs["completion_mask"].sum())
    assert ours() == pytest.approx(loss, abs=2e-6)
    wrong = dict(temperature=ours(temperature=1.0), swapped=ours(clip_low=0.28, clip_high=0.1),
                 local_counts=ours(counts=Counts(local, MICRO_BATCH)), aggregation=ours(aggregation="sequence-mean"))
    for name, value in wrong.items():
        assert abs(value - loss) > 1e-3, (name, value, loss)
