"""The choices of the main job that no measurement makes: tasks, optimizers, how the time is shared out.

Learning rates are functions of progress, never of steps, so that they hold on a machine of another speed.
"""

from __future__ import annotations

from collections.abc import Sequence

from pellucid import tasks
from pellucid.align import ObjectiveConfig
from pellucid.nn import MLP, Attn, DecoderSpec, Layer, Rope
from pellucid.optim import OptimConfig, Schedule

STAGES = ("tokenizer", "pretrain", "sft", "grpo", "quantize", "evaluate", "tools")

# Of the time that is left when a stage begins (less what the short stages at the end need).
SHARES = {"pretrain": 0.29, "sft": 0.38, "grpo": 1.0}
VOCAB = 2048
CONTEXT = 512
ROW = 256  # tokens in a packed row
ROWS = 8  # rows in a step
FACTS_SHARE = 0.2  # of the pretraining tokens: single operations, on which the later stages build
AT_A_GLANCE = 0.6  # of them: the right answer without its steps (see sft.py)
SAVE_SECONDS = 60.0  # between resume states within a stage
MAX_TOKENS = 88  # of a completion; demonstrations have 15 to 75

# width, layers, heads, key/value heads, feed-forward: a ladder from 0.2 M to 90 M parameters
LADDER = (
    (64, 3, 2, 1, 192), (96, 4, 3, 1, 256), (128, 4, 4, 2, 384), (192, 5, 6, 2, 512), (256, 6, 8, 2, 704),
    (384, 8, 6, 2, 1024), (512, 10, 8, 4, 1408), (768, 12, 12, 4, 2048),
)


def problems(minutes: float, tokens_per_second: float) -> int:
    """Held-out problems of an evaluation that is reported: as many as take about 3 % of the time, at most 1000."""
    affordable = 0.03 * 60 * minutes * tokens_per_second / 40
    return int(max(24, min(1000, max(80, 125 * minutes), affordable)))


def demonstrations(minutes: float) -> int:
    """As many as a run of this length can look at about twice; making them takes time too."""
    return int(max(500, min(20_000, 1250 * minutes)))


def prompts(seconds: float, tokens_per_second: float) -> int:
    """Problems of a rollout: 32, or fewer where a large model would make less than some thirty steps of them."""
    return int(max(2, min(32, seconds / 30 * tokens_per_second / (GROUP * 60))))


def measure_seconds(problems: int, tokens_per_second: float) -> float:
    """A greedy evaluation: some 30 tokens an answer, sampled about as fast as tokens are trained on; half as much again, for
    prompts and unequal lengths."""
    return 1.5 * 30 * problems / tokens_per_second


AT_THE_END = 2 + 2 * 8 / 10  # evaluations: INT8 beside float32, and eight samples of a tenth of the problems for two models


def tail_seconds(one: float) -> float:
    """What quantize, evaluate, tools and the report need at the end; `one`: seconds of an evaluation."""
    return 14.0 + AT_THE_END * one


# Arithmetic is two tasks in one, and the one of the four that no model of this size does at a glance.
TASKS = {"countdown": 1.0, "arithmetic": 1.5, "sorting": 1.0, "calculator": 1.0}


def task_mix() -> tasks.Mixture:
    """Countdown with visible search, addition and subtraction with carried digits, sorting, calculator calls."""
    return tasks.Mixture([(tasks.make(name), weight) for name, weight in TASKS.items()])


def training_mix() -> tasks.Mixture:
    """What GRPO practises: fewer calculator calls, which are known after SFT: most of their groups would teach nothing."""
    return tasks.Mixture([(tasks.make(name), 0.3 if name == "calculator" else weight) for name, weight in TASKS.items()])


def model_spec(rung: Sequence[int], vocab: int = VOCAB) -> DecoderSpec:
    """A Qwen3 of that rung of the ladder: RMS-normed queries and keys, SwiGLU, grouped heads, tied embedding."""
    width, layers, heads, kv_heads, ffn = rung
    d = width // heads
    layer = Layer(Attn(heads, kv_heads, d, Rope(d, 10_000.0), qk_norm=True), MLP(ffn))
    return DecoderSpec(vocab, width, (layer,) * layers, tied=True, context=CONTEXT, family="qwen3")


PRETRAIN = OptimConfig("muon", lr=0.02, adam_lr=0.003)
PRETRAIN_SCHEDULE = Schedule("wsd", warmup=0.02, decay=0.4)
SFT = OptimConfig("muon", lr=0.02, adam_lr=0.003)
SFT_SCHEDULE = Schedule("wsd", warmup=0.02, decay=0.5)
GRPO = OptimConfig("adamw", lr=7e-4)
GRPO_SCHEDULE = Schedule("linear", warmup=0.03, floor=0.05)
OBJECTIVE = ObjectiveConfig(clip_high=0.28, dead_groups="drop", log_ratio_bound=20.0)
REWARDS = {"correct": 1.0, "format": 0.2, "progress": 0.1}
GROUP = 8

# A checkpoint that somebody trained for real is moved with care.
REAL_SFT = OptimConfig("adamw", lr=2e-5)
REAL_GRPO = OptimConfig("adamw", lr=2e-6)
