"""`pellucid align dpo | kto | rm | prm`: learning from judgements that are given, for any checkpoint and any data set of the usual formats."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pellucid.cli.base import OpensModel, Positional, prepare
from pellucid.errors import BadInput

if TYPE_CHECKING:
    from pellucid.align.offline import OfflineConfig, OfflineLoop
    from pellucid.align.preference_config import PreferenceConfig
    from pellucid.tokenizers import Tokenizer


@dataclass(frozen=True)
class OfflineOptions(OpensModel):
    """What the methods on given answers share."""

    model: Positional[str]
    """Checkpoint to start from (and the reference): a folder or a Hub id. Also as --model.
    起始检查点（同时是参考模型）：目录或 Hub id；也可写作 --model。"""
    data: Positional[str]
    """Data set: a .jsonl, .json or .parquet file, a folder, or a Hub id; its format is recognised. Also as --data.
    数据集：.jsonl、.json 或 .parquet 文件、目录或 Hub id；格式自动识别；也可写作 --data。"""
    out: Path = Path("runs/align")
    """Folder for the model and the resume state.
    结果与续训状态的目录。"""
    steps: int | None = None
    """Optimizer steps; by default one pass over the data.
    优化步数；默认遍历数据一遍。"""
    minutes: float | None = None
    """Length of the run in minutes, instead of --steps.
    分钟数（代替 --steps）。"""
    batch: int = 32
    """Examples in a step.
    每步样本数。"""
    micro: int | None = None
    """Examples in a micro-batch: memory only, the numbers stay.
    微批样本数：只影响内存，不影响数值。"""
    length: int = 1024
    """Longest example in tokens; longer ones lose their end.
    最长样本（词元）；更长者截去末尾。"""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """Optimizer.
    优化器。"""
    lr: float = 1e-6
    """Learning rate (about 1e-4 for a model of a million parameters).
    学习率（百万参数的模型约 1e-4）。"""
    split: str = "train"
    """Which part of a data set with several.
    数据集含多个部分时取哪一部分。"""
    processes: int = 1
    """Processes that do the run together, each its share of a step (torchrun does as well); one computes the same.
    共同完成训练的进程数，各做每步的一份（也可用 torchrun 启动）；结果与单进程相同。"""
    dry_run: bool = False
    """Print the objective, the arithmetic of a step and the first example as the model sees it, and stop.
    只打印目标函数、每步的算术与模型所见的第一个样本，然后停止。"""
    resume: bool = False
    """Go on with the interrupted run in the same folder.
    继续同一目录中被中断的训练。"""


@dataclass(frozen=True)
class Dpo(OfflineOptions):
    """Direct preference optimisation and its family, on pairs of a better and a worse answer.
    直接偏好优化及其同族方法：从一好一坏的回答对中学习。

    $ pellucid align dpo runs/grow/model pairs.jsonl --loss sigmoid --beta 0.1 --lr 1e-4
    $ pellucid align dpo runs/grow/model pairs.jsonl --recipe simpo --lr 1e-4
    """

    recipe: str | None = None
    """A published objective with its numbers: dpo, cdpo, robust, ipo, ipo-sum, hinge, dpo-norm, exo, nca, bco, sppo, apo-zero, apo-down, aot,
    aot-unpaired, discopop, rpo, mpo, wpo, ld-dpo, simpo, cpo, orpo; by default dpo.
    已发表的目标函数及其数值；默认 dpo。"""
    loss: tuple[str, ...] = ()
    """Losses, instead of the recipe's: sigmoid (DPO), cdpo, robust, ipo, ipo_sum, hinge, sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard,
    apo_zero, apo_down, aot, aot_unpaired, discopop, simpo, cpo, orpo, sft; several are added up, each as NAME or NAME*WEIGHT. One alone is its
    recipe (orpo and cpo with their sft); without --recipe one with a weight or beside sft has its recipe's numbers, others DPO's.
    损失函数（代替预设中的）；给出多个则相加，可写作 名称*权重。单独一个即其预设（orpo、cpo 含 sft 项）；未给 --recipe 时，带权重或与 sft
    同用的取其预设的数值，其余取 DPO 的数值。"""
    beta: float | None = None
    """How strongly the policy is held to the reference; by default the recipe's, 0.1 for most.
    对参考模型的约束强度；默认取预设值，多为 0.1。"""
    smoothing: float | None = None
    """Share of pairs whose label is believed to be wrong (cdpo, robust, exo_pair, aot, simpo, cpo).
    估计标错的样本比例。"""
    set: tuple[str, ...] = ()
    """Any other choice of the objective as NAME=VALUE: f_divergence=js, alpha=0.5, gamma=1, tau=0.05, weighting=wpo, ld_alpha=0.5.
    目标函数的其他选择，写作 名称=值。"""
    reference: Literal["precompute", "live"] = "precompute"
    """Log-probabilities of the reference: computed once before the run, or in every step.
    参考模型的对数概率：训练前一次算好，或每步计算。"""


@dataclass(frozen=True)
class Kto(OfflineOptions):
    """Kahneman-Tversky optimisation, on single answers that are labelled good or bad (pairs are taken apart).
    KTO：从单个标注好坏的回答中学习（成对数据会被拆开）。

    $ pellucid align kto runs/grow/model feedback.jsonl --lr 1e-4
    """

    loss: Literal["kto", "apo_zero"] = "kto"
    """kto: against the KL to the reference; apo_zero: against the reference itself.
    kto：以对参考模型的 KL 为基准；apo_zero：以参考模型本身为基准。"""
    beta: float = 0.1
    """How strongly the policy is held to the reference.
    对参考模型的约束强度。"""
    good_weight: float = 1.0
    """Weight of good answers.
    好回答的权重。"""
    bad_weight: float = 1.0
    """Weight of bad answers.
    坏回答的权重。"""


@dataclass(frozen=True)
class Rm(OfflineOptions):
    """A reward model by Bradley-Terry, on pairs; transformers opens it as a sequence classifier with one label.
    用 Bradley-Terry 在成对数据上训练奖励模型；transformers 可作为单标签序列分类器打开。

    $ pellucid align rm runs/grow/model pairs.jsonl --lr 1e-4
    """

    centring: float = 0.0
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards near zero.
    使奖励保持在零附近的惩罚权重。"""


@dataclass(frozen=True)
class Prm(OfflineOptions):
    """A process reward model, on solutions whose steps are labelled right or wrong ({"prompt", "completions": [...], "labels": [...]}): how
    likely each step is right, by binary cross-entropy at its end. `eval --k 8 --reward-model FOLDER` and `grpo --reward-model FOLDER` use it.
    过程奖励模型：从逐步标注对错的解答（{"prompt", "completions": [...], "labels": [...]}）中学习每一步正确的概率，在每步末尾取二元交叉熵；
    可用于 eval --k 8 --reward-model 目录 与 grpo --reward-model 目录。

    $ pellucid align prm runs/grow/model --data stepwise.jsonl --lr 1e-4
    """

    separator: str = "\\n"
    """What stands behind each step, and carries its score; \\n is a line break, \\t a tab.
    每步之后的分隔符，该步的得分在此读出；\\n 为换行，\\t 为制表符。"""


def dpo(config: Dpo) -> None:
    from pellucid.align.examples import encode_pairs
    from pellucid.align.offline import PreferenceLoop, pair_accuracy
    from pellucid.align.preference_config import preference_formula

    objective = preferences(config)
    job = Job(config, "dpo", "preference", encode_pairs, preference_formula(objective))
    if job.ready:
        held = job.heldout
        job.run(lambda settings, **how: PreferenceLoop(job.model, job.items, objective, settings, evaluate=lambda: (
            "held-out pairs told apart", *pair_accuracy(job.model, held, job.reference(held))), **how), save_decoder)


def preferences(config: Dpo) -> PreferenceConfig:
    """The recipe, with what was chosen besides."""
    from pellucid.align.preference_config import PreferenceConfig, preference_recipe, recipe_of_losses
    from pellucid.cli.align import chosen

    changes: dict[str, Any] = {name: value for name in ("beta", "smoothing") if (value := getattr(config, name)) is not None}
    losses = dict(map(_weighted, config.loss))
    alone = config.recipe is None and len(config.loss) == 1 and "*" not in config.loss[0]
    recipe = config.recipe or recipe_of_losses(losses)
    if losses and (not alone or recipe == "dpo"):
        changes["losses"] = losses
    more = chosen(config.set, [f.name for f in fields(PreferenceConfig) if f.name != "losses"], "gamma=1 f_divergence=js")
    if twice := sorted(set(changes) & set(more)):
        raise BadInput(f"{twice[0]} is given twice", "as a flag and by --set", "give it once")
    return preference_recipe(recipe, **changes, **more)


def _weighted(word: str) -> tuple[str, float]:
    name, star, weight = word.partition("*")
    try:
        return name, float(weight) if star else 1.0
    except ValueError as error:
        raise BadInput(f"--loss {word} cannot be read", "it is NAME or NAME*WEIGHT", "for instance --loss sigmoid*0.8 bco_pair*0.2 sft") from error


def prm(config: Prm) -> None:
    from pellucid.align.examples import encode_steps
    from pellucid.align.reward_model import ProcessLoop, RewardModel, StepFormat, judged_right, save_reward_model
    from pellucid.messages import three_parts

    separator, talks = config.separator.replace("\\n", "\n").replace("\\t", "\t"), False
    if not separator:
        raise BadInput(*three_parts("prm.separator"))

    def encode(tokenizer: Tokenizer, records: Any, longest: int) -> list[Any]:
        nonlocal talks
        talks = talks or any(not isinstance(record.prompt, str) for record in records)
        return encode_steps(tokenizer, records, longest, separator)

    job = Job(config, "prm", "stepwise", encode, "-y log σ(s) - (1 - y) log σ(-s), a mean over the steps of a batch; s: the score at a step's end")
    if not job.ready:
        return
    scorer = RewardModel.of(job.model, config.seed or 0)
    job.run(lambda settings, **how: ProcessLoop(scorer, job.items, settings, evaluate=lambda: judged_right(scorer, job.heldout), **how),
            lambda _, folder, tokenizer: save_reward_model(scorer, folder, tokenizer, StepFormat(separator, talks)))


def kto(config: Kto) -> None:
    from pellucid.align.examples import encode_labelled
    from pellucid.align.offline import UnpairedLoop
    from pellucid.align.unpaired import UnpairedConfig, unpaired_formula

    objective = UnpairedConfig(config.loss, config.beta, config.good_weight, config.bad_weight)
    job = Job(config, "kto", "unpaired-preference", encode_labelled, unpaired_formula(objective))
    if job.ready:
        job.run(lambda settings, **how: UnpairedLoop(job.model, job.items, objective, settings, evaluate=job.labels_told_apart, **how),
                save_decoder)


def rm(config: Rm) -> None:
    from pellucid.align.examples import encode_pairs
    from pellucid.align.reward_model import RewardLoop, RewardModel, save_reward_model

    job = Job(config, "rm", "preference", encode_pairs,
              "-log σ(r_chosen - r_rejected - margin)" + (f" + {config.centring:g} (r_chosen + r_rejected)²" if config.centring else ""))
    if not job.ready:
        return
    scorer = RewardModel.of(job.model, config.seed or 0)

    def told_apart() -> tuple[str, float, dict[str, Any]]:
        import torch

        with torch.no_grad():
            better = scorer.eval().scores([p.chosen for p in job.heldout]) > scorer.scores([p.rejected for p in job.heldout])
        return "held-out pairs told apart", float(better.float().mean()), {"pairs": len(job.heldout)}

    job.run(lambda settings, **how: RewardLoop(scorer, job.items, settings, centring=config.centring, evaluate=told_apart, **how),
            lambda _, folder, tokenizer: save_reward_model(scorer, folder, tokenizer))


def save_decoder(model: Any, folder: Path, tokenizer: Tokenizer) -> None:
    from pellucid.models import save

    save(model, folder, tokenizer=tokenizer)


class Job:
    """Data, model and folder of one run: what the methods share. `ready` is False after a dry run."""

    def __init__(self, config: OfflineOptions, stage: str, wanted: Any, encode: Callable[..., list[Any]], formula: str):
        from pellucid import events
        from pellucid.cli.align import check_length
        from pellucid.data.formats_files import open_data
        from pellucid.data.split import divide_by
        from pellucid.models import load
        from pellucid.tokenizers import Tokenizer

        check_length(config.steps, config.minutes)
        self.config, self.stage = config, stage
        device = prepare(config)
        self.tokenizer = Tokenizer.load(config.model)
        records: Any = open_data(config.data, config.split, wanted=wanted)
        sides = divide_by(records, lambda record: str(record.prompt), config.data, "examples")
        self.items, self.heldout = (encode(self.tokenizer, side, config.length) for side in sides)
        self.formula = formula
        events.note(f"{stage}: {formula}")
        events.note(f"{len(self.items)} examples to learn from, {len(self.heldout)} held out by a hash of their prompt")
        self.ready = not config.dry_run
        if config.dry_run:
            self._show()
            return
        self.model = load(config.model, device=str(device), allow_missing=config.allow_missing)

    def reference(self, pairs: Sequence[Any]) -> Any:
        """Log-probabilities of the held-out pairs under the given weights, computed once."""
        from pellucid.align.answers import logprobs_of

        if not hasattr(self, "_reference"):
            self._reference = logprobs_of(self.model.eval(), [a for p in pairs for a in (p.chosen, p.rejected)])
        return self._reference

    def labels_told_apart(self) -> tuple[str, float, dict[str, Any]]:
        """Held-out answers whose implicit reward log p / p_ref lies on the right side of the median."""
        import torch

        from pellucid.align.answers import logprobs_of

        answers = [x.answer for x in self.heldout]
        now = torch.stack([x.sum() for x in logprobs_of(self.model.eval(), answers)])
        if not hasattr(self, "_before"):
            self._before = now
        reward, good = now - self._before, torch.tensor([x.good for x in self.heldout], device=now.device)
        if bool(good.all()) or not bool(good.any()):
            return "held-out labels told apart", 0.5, {"answers": len(good)}
        pairs = reward[good][:, None] - reward[~good][None, :]  # the chance that a good answer gained more than a bad one (AUC)
        return "held-out labels told apart", float((pairs > 0).float().mean() + 0.5 * (pairs == 0).float().mean()), {"answers": len(good)}

    def run(self, make: Callable[..., OfflineLoop[Any]], write: Callable[[Any, Path, Tokenizer], None]) -> None:
        from pellucid import events
        from pellucid.align.recording import recorded
        from pellucid.cli.align_page import report_of
        from pellucid.train.ranks import joined

        c, ranks = self.config, joined()
        loop = make(self.settings(), checkpoint=c.out / "checkpoint", tokenizer=self.tokenizer, resume_hint="the same command with --resume",
                    ranks=ranks)
        assert loop.evaluate is not None
        name, before, _ = loop.evaluate()
        if c.resume and not loop.resume():
            events.note(f"nothing to resume in {c.out}: starting from {c.model}", "warning")
        with recorded(c.out, loop) if ranks.first else contextlib.nullcontext():
            history = loop.run()
            _, after, _ = loop.evaluate()
            events.emit(events.StageEnd(self.stage, history.seconds, before, after, name, "", True))
        if not ranks.first:
            return
        write(self.model, c.out / "model", self.tokenizer)
        print(f"{name} {before:.1%} -> {after:.1%}; model in {c.out / 'model'}; report in {report_of(c.out)}")

    def settings(self) -> OfflineConfig:
        from pellucid.align.offline import OfflineConfig
        from pellucid.optim import OptimConfig

        c = self.config
        seconds = None if c.minutes is None else c.minutes * 60
        steps = c.steps if c.steps is not None or seconds is not None else max(1, -(-len(self.items) // c.batch))
        return OfflineConfig(stage=self.stage, steps=steps, seconds=seconds, batch=min(c.batch, len(self.items)), micro=c.micro,
                             optim=OptimConfig(c.optimizer, lr=c.lr), seed=c.seed or 0,
                             reference=c.reference if isinstance(c, Dpo) else "precompute")

    def _show(self) -> None:
        """What a run would do."""
        from pellucid import events
        from pellucid.cli.align_dry import DryRun, example, legend, marked, sizes

        settings, first, show = self.settings(), self.items[0], self.tokenizer
        shown = {name: answer for name in ("chosen", "rejected", "answer") if (answer := getattr(first, name, None)) is not None}
        if self.stage == "prm":
            shown = {"steps": first.marked()}
        micro = settings.micro or settings.batch
        length = "by the clock" if settings.steps is None else f"{settings.steps} steps, {settings.steps * settings.batch / len(self.items):.2f} times " \
            "through the data"
        needed = self._memory(micro * (2 if "chosen" in shown else 1))
        events.emit(DryRun(self.stage, self.formula, {
            "batch": settings.batch, "micro": micro, "steps": settings.steps, "examples": len(self.items), "held_out": len(self.heldout)}, needed,
            [example(a.prompt, a.tokens, a.mask, show) | {"part": name} for name, a in shown.items()]))
        print(f"objective: {self.formula}")
        print(f"step: {settings.batch} examples in micro-batches of {micro} (memory only); {length}; {len(self.items)} examples")
        print(f"memory of all tensors, about (the process itself takes some 0.3 GiB more): {sizes(needed)}")
        print(f"the first example as the model sees it\n{legend()}")
        for name, a in shown.items():
            print(f"  {name}: {a.trained} trained tokens behind {len(a.prompt)}\n  "
                  f"{marked(show, a.prompt + a.tokens, [False] * len(a.prompt) + (a.mask or [True] * len(a.tokens)))}")

    def _memory(self, answers: int) -> dict[str, int]:
        """Of a micro-batch of so many answers of the data's mean length, by the model's shape: no weight is read."""
        import torch

        from pellucid.align.estimate import learning, with_peak
        from pellucid.models.hub import local_folder, read_config, spec_of
        from pellucid.nn import Decoder

        with torch.device("meta"):
            model = Decoder(spec_of(read_config(local_folder(self.config.model))))
        every = [a for x in self.items for name in ("chosen", "rejected", "answer") if (a := getattr(x, name, None)) is not None]
        parts = learning(model, self.config.optimizer, answers * sum(map(len, every)) // len(every))
        if isinstance(self.config, Dpo) and self.config.reference == "live":
            parts["reference"] = parts["weights"]
        return with_peak(parts)
