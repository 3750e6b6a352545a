"""Reward models: a decoder whose head is one number, at the last token of an answer or of each of its steps.

On disk they are what transformers opens as `...ForSequenceClassification` with one label.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.align.answers import Answer, Flat
from pellucid.align.offline import OfflineConfig, OfflineLoop, Pair
from pellucid.align.reward_losses import bradley_terry, pair_shares, process_loss
from pellucid.errors import BadInput
from pellucid.files import atomic_folder, write_atomic
from pellucid.messages import add, three_parts
from pellucid.models.families import Family, config_of, family_of
from pellucid.models.hub import allocate, local_folder, main_layers, read_config, spec_of, write_weights
from pellucid.models.weights import Weights, planned
from pellucid.nn import Decoder, DecoderSpec, Routing
from pellucid.nn.linear import Linear
from pellucid.runtime import choose_device, dtype_of
from pellucid.train.loss import balance_share, routing_of

add({
    "prm.separator": ("a step needs something behind it", "每步之后须有分隔符"),
    "prm.separator.why": ("the separator is empty, and the score of a step is read there", "分隔符为空，而该步的得分在此读出"),
    "prm.separator.next": ("give --separator '\\n', or what your steps end with", "请给出 --separator '\\n'，或各步之后所用的分隔符"),
    "prm.config": ("{folder}: config.json has process_reward={found}", "{folder}：config.json 中 process_reward={found}"),
    "prm.config.why": ("it holds the text behind each step (separator), and whether prompts are messages (conversational)",
                       "其中应为每步之后的文本（separator），以及提示是否为消息列表（conversational）"),
    "prm.config.next": ('mend it: {{"separator": "\\n", "conversational": false}}', '请改为 {{"separator": "\\n", "conversational": false}}'),
})


@dataclass(frozen=True)
class StepFormat:
    """How a process model reads a solution; stands in its config.json as `process_reward`, and says that it is one."""

    separator: str = "\n"
    """Behind each step; its last token carries the step's score."""
    conversational: bool = False
    """Prompts are messages, which go through the chat template; else plain texts."""


class RewardModel(Decoder):
    """tokens -> one score; `spec` without a language head. `RewardModel.of(decoder)` starts from a language model."""

    def __init__(self, spec: DecoderSpec):
        super().__init__(replace(spec, tied=True))
        self.score = Linear(spec.dim, 1)

    @classmethod
    def of(cls, decoder: Decoder, seed: int = 0) -> RewardModel:
        """Shares the decoder's weights (they train on); the score starts with a small normal, std 1 / sqrt(D + 1)."""
        with torch.device("meta"):
            model = cls(decoder.spec)
        own = {n: p for n, p in decoder.state_dict(keep_vars=True).items() if not n.startswith("head.")}
        D = decoder.spec.dim
        first = torch.randn(1, D, generator=torch.Generator().manual_seed(seed)) / (D + 1) ** 0.5
        weight = decoder.embed.weight
        model.load_state_dict({**own, "score.weight": first.to(weight.device, weight.dtype)}, assign=True)
        model.requires_grad_()
        model.compute_dtype = decoder.compute_dtype
        return model

    def scores(self, answers: Sequence[Answer], routing: Routing | None = None) -> Tensor:
        """(S,) the score of each whole answer, read at its last token."""
        return self.scores_at(answers, [[len(a.tokens) - 1] for a in answers], routing)[0]

    def scores_at(self, answers: Sequence[Answer], ends: Sequence[Sequence[int]], routing: Routing | None = None) -> tuple[Tensor, Tensor]:
        """The scores at these of each answer's tokens, in order, (M,), and whose they are, (M,)."""
        marked = [Answer(a.prompt + a.tokens[:1], [*a.tokens[1:], 0], _mask(len(a.tokens), e)) for a, e in zip(answers, ends)]
        flat = Flat(marked, self.embed.weight.device)  # a label behind each token whose hidden state is read
        values = self.score(flat.hidden(self, routing))
        order = flat.index.argsort()
        return values.squeeze(-1).to(torch.promote_types(values.dtype, torch.float32))[order], flat.sequence[order]


def _mask(tokens: int, ends: Sequence[int]) -> list[bool]:
    if any(not 0 <= e < tokens for e in ends):
        raise BadInput(f"a step ends at {max(ends)}, the answer has {tokens} tokens", next="count from 0 within the answer")
    return [i in set(ends) for i in range(tokens)]


class RewardLoop(OfflineLoop[Pair]):
    """`RewardLoop(RewardModel.of(model), pairs, ...).run()` trains on pairs by Bradley-Terry."""

    def __init__(self, model: RewardModel, pairs: Sequence[Pair], config: OfflineConfig, *, centring: float = 0.0, **how: Any):
        super().__init__(model, pairs, config, **how)
        self.centring, self.scorer = centring, model

    def prepare(self, ids: list[int]) -> tuple[Callable[[list[int]], Tensor], list[dict[str, Tensor]]]:
        parts: list[dict[str, Tensor]] = []

        def share(micro: list[int]) -> Tensor:
            routing = routing_of(self.scorer)
            scores = self.scorer.scores([a for i in micro for a in (self.items[i].chosen, self.items[i].rejected)], routing)
            margin = torch.tensor([self.items[i].margin for i in micro], device=scores.device)
            chosen, rejected = scores[0::2], scores[1::2]
            parts.append(pair_shares(chosen, rejected, len(ids)))
            return bradley_terry(chosen, rejected, margin, self.centring).sum() / len(ids) + balance_share(routing, len(micro) / len(ids))

        return share, parts

    def table(self, merged: dict[str, float]) -> dict[str, float]:
        merged["score/std"] = max(merged.pop("score/square") - merged["score/mean"] ** 2, 0.0) ** 0.5
        return merged

    def write(self, folder: Path) -> None:
        write_reward_model(self.scorer, folder)

    def read(self, folder: Path) -> None:
        read_reward_model(self.scorer, folder)


@dataclass(frozen=True)
class Steps:
    """A solution in steps: where each ends among the answer's tokens, and whether it is right (or how likely)."""

    answer: Answer
    ends: list[int]
    labels: list[float]

    def marked(self) -> Answer:
        """Its mask: the tokens that carry a score."""
        return Answer(self.answer.prompt, self.answer.tokens, _mask(len(self.answer.tokens), self.ends))


class ProcessLoop(OfflineLoop[Steps]):
    """`ProcessLoop(RewardModel.of(model), solutions, ...).run()` trains a score of every step by binary cross-entropy."""

    def __init__(self, model: RewardModel, items: Sequence[Steps], config: OfflineConfig, **how: Any):
        for number, x in enumerate(items):
            if len(x.ends) != len(x.labels) or not x.ends or sorted(set(x.ends)) != x.ends:
                raise BadInput(f"solution {number} has {len(x.ends)} ends and {len(x.labels)} labels",
                               "each step ends once, behind the one before", "correct or leave it out")
        super().__init__(model, items, config, **how)
        self.scorer = model

    def prepare(self, ids: list[int]) -> tuple[Callable[[list[int]], Tensor], list[dict[str, Tensor]]]:
        total = sum(len(self.items[i].ends) for i in ids)
        parts: list[dict[str, Tensor]] = []

        def share(micro: list[int]) -> Tensor:
            routing = routing_of(self.scorer)
            scores, _ = self.scorer.scores_at([self.items[i].answer for i in micro], [self.items[i].ends for i in micro], routing)
            labels = torch.tensor([y for i in micro for y in self.items[i].labels], device=scores.device)
            right = (scores.detach() > 0) == (labels > 0.5)
            parts.append({"accuracy": right.float().sum() / total, "score/mean": scores.detach().sum() / total})
            return process_loss(scores, labels).sum() / total + balance_share(routing, len(micro) / len(ids))

        return share, parts

    def write(self, folder: Path) -> None:
        write_reward_model(self.scorer, folder)

    def read(self, folder: Path) -> None:
        read_reward_model(self.scorer, folder)


@torch.no_grad()
def judged_right(model: RewardModel, items: Sequence[Steps], at_once: int = 32) -> tuple[str, float, dict[str, Any]]:
    """Steps whose probability lies on the side of 1/2 of their label: name, share, and how many of them are right ones (a model that
    knows nothing but that reaches the larger of this share and the rest)."""
    parts = [items[i : i + at_once] for i in range(0, len(items), at_once)]
    scores = torch.cat([model.eval().scores_at([x.answer for x in part], [x.ends for x in part])[0] for part in parts])
    labels = torch.tensor([y for x in items for y in x.labels], device=scores.device) > 0.5
    return "held-out steps judged right", float(((scores > 0) == labels).float().mean()), {
        "steps": len(labels), "right_steps": float(labels.float().mean())}


# --- on disk ----------------------------------------------------------------------------------------------------------


def save_reward_model(model: RewardModel, folder: str | Path, tokenizer: Any = None, steps: StepFormat | None = None) -> None:
    """Writes what `transformers.AutoModelForSequenceClassification` opens; the folder appears whole or not at all.

    steps: of a process model; transformers reads its score at the last token, so the last step's.
    """
    with atomic_folder(folder) as new:
        write_reward_model(model, new)
        fields = json.loads((new / "config.json").read_text(encoding="utf-8"))
        if tokenizer is not None:
            tokenizer.save(new)
            fields["pad_token_id"] = tokenizer.pad_id
        if steps is not None:
            fields["process_reward"] = asdict(steps)
        write_atomic(new / "config.json", json.dumps(fields, indent=2) + "\n")


def step_format(path_or_id: str | Path) -> StepFormat | None:
    """How a process model reads its steps; None for another model. Errors: BadInput where config.json is damaged there."""
    folder = local_folder(path_or_id)
    found = read_config(folder).get("process_reward")
    if found is None:
        return None
    if not isinstance(found, dict) or set(found) != {"separator", "conversational"} or not isinstance(found["separator"], str) \
            or not found["separator"] or not isinstance(found["conversational"], bool):
        raise BadInput(*three_parts("prm.config", folder=folder, found=str(found)[:80]))
    return StepFormat(**found)


def load_reward_model(path_or_id: str | Path, dtype: str | torch.dtype = "float32", device: str = "cpu") -> RewardModel:
    """A folder (or Hub id) of a decoder with one score. Errors: BadInput for one without, and all of `load`."""
    folder = local_folder(path_or_id)
    fields = read_config(folder)
    labels = fields.get("num_labels", len(fields.get("id2label", {})) or None)
    if labels not in (None, 1):
        raise BadInput(f"{folder} has {labels} labels", "a reward model has one score", "give a reward model")
    with torch.device("meta"):
        model = RewardModel(spec_of(fields))
    allocate(model, dtype_of(dtype), choose_device(device).value)
    read_reward_model(model, folder)
    return model.eval()


def write_reward_model(model: RewardModel, folder: Path) -> None:
    family = _family(model)
    write_weights(planned(model, family, main_layers(model)), folder, 5 * 10**9)
    config = config_of(model.spec)
    config["architectures"] = [_classifier(name) for name in config["architectures"]]
    dtype = str(model.score.weight.dtype).removeprefix("torch.")
    fields = config | {"dtype": dtype, "num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    write_atomic(folder / "config.json", json.dumps(fields, indent=2) + "\n")


def read_reward_model(model: RewardModel, folder: Path) -> None:
    with ExitStack() as stack:
        weights = Weights(folder, stack, _family(model))
        weights.check(model, main_layers(model))
        weights.fill(model, main_layers(model), adopt=False)


def _family(model: RewardModel) -> Family:
    family = family_of(model.spec)
    return replace(family, names={**family.names, "score.weight": ("score.weight",)})


def _classifier(architecture: str) -> str:
    for end in ("ForCausalLM", "LMHeadModel"):
        if architecture.endswith(end):
            return architecture.removesuffix(end) + "ForSequenceClassification"
    raise BadInput(f"a {architecture} has no form with a score that transformers knows", next="choose a causal language model")
