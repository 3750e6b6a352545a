"""The words and number formats of the report, in both languages."""

from __future__ import annotations

from typing import Any

from pellucid.grow.charts import Label, Text, finite, number

STAGES = {
    "tokenizer": Text("Tokenizer", "分词器"),
    "pretrain": Text("Pretraining", "预训练"),
    "sft": Text("Fine-tuning on thoughts", "监督微调（思维链）"),
    "grpo": Text("Reinforcement learning (GRPO)", "强化学习（GRPO）"),
    "quantize": Text("INT8 weights", "INT8 量化"),
    "evaluate": Text("Evaluation", "评测"),
    "tools": Text("Tool calls through the server", "经服务器调用工具"),
}
STATES = {  # the model after a stage, as the samples and the evaluation name it
    "given": Text("as given", "原始检查点"),
    "pretrain": Text("after pretraining", "预训练后"),
    "sft": Text("after fine-tuning", "微调后"),
    "grpo": Text("after GRPO", "GRPO 后"),
    "int8": Text("with INT8 weights", "INT8 权重"),
}
COLOURS = {"given": 0, "pretrain": 0, "sft": 1, "grpo": 2, "int8": 3}  # of the bars, `k0` ... in the page
TASKS = {
    "countdown": Text("countdown", "凑数"),
    "arithmetic": Text("arithmetic", "竖式加减"),
    "sorting": Text("sorting", "排序"),
    "calculator": Text("calculator", "计算器"),
}
REWARDS = {
    "format": Text("format", "格式"),
    "correct": Text("correct", "正确"),
    "progress": Text("progress", "过程"),
    "solved": Text("solved", "解出"),
}
MEASURES = {
    "bytes per token on held-out text": "留出文本上每词元的字节数",
    "bits per byte on held-out text": "留出文本的每字节比特数",
    "accuracy on held-out problems": "留出题目的正确率",
    "accuracy on held-out problems, INT8 weights": "留出题目的正确率（INT8 权重）",
    "pass@8 on held-out problems, sampled": "留出题目的 pass@8（采样）",
    "problems solved through the server": "经服务器作答的解出率",
    "loss": "损失（nats/词元）",
    "held-out bits per byte": "留出文本：每字节比特数",
    "held-out accuracy": "留出题目：正确率",
    "accuracy": "采样题目：正确率",
    "format": "格式正确率",
    "length/mean": "平均长度（词元）",
    "entropy/mean": "平均熵（nats/词元）",
    "groups/live": "组内奖励有差别的组所占比例",
}
CURVES = {  # clearer English for some curves
    "loss": "loss (nats per token)",
    "accuracy": "accuracy of the samples trained on",
    "format": "samples in the right form",
    "length/mean": "mean length (tokens)",
    "entropy/mean": "mean entropy (nats per token)",
    "groups/live": "groups with unequal rewards",
}
UNITS = {"bytes": "字节"}
PLAN = {"device": "设备", "threads": "线程", "dtype": "数值格式", "kernels": "内核", "size": "大小"}
MODEL = {
    "family": Text("family", "模型族"), "parameters": Text("parameters", "参数量"), "layers": Text("layers", "层数"),
    "dim": Text("width", "宽度"), "heads": Text("query heads", "查询头"), "kv_heads": Text("key/value heads", "键值头"),
    "head_dim": Text("head width", "每头宽度"), "ffn": Text("feed-forward width", "前馈宽度"),
    "vocab": Text("vocabulary", "词表"), "context": Text("context", "上下文长度"),
}
DETAILS = {
    "tokens": "词元", "tokens_per_second": "词元/秒", "steps": "步数", "epochs": "轮数", "demonstrations": "示范",
    "corpus_bytes": "语料字节", "heldout_bytes": "留出字节", "vocabulary": "词表大小", "problems": "题目数", "asked": "提问数",
    "sampled_tokens": "采样词元", "sampling_tokens_per_second": "采样词元/秒", "sampling_share": "采样占时",
    "format": "格式正确率", "kernel": "算子", "relative_error": "相对误差",
}
SHARES = {"accuracy", "format", "truncated", "groups/live", "held-out accuracy", "sampling_share", "reasoning"}


def measure(name: str) -> Text:
    """The name of a measure or a curve; an unknown one stands as it is in both languages."""
    return Text(CURVES.get(name, name), MEASURES.get(name, name))


def detail(name: str) -> Text:
    plain = name.replace("_", " ").replace(" per second", "/s")
    return Text(plain, DETAILS.get(name, plain))


def share(value: Any) -> str:
    return number(value, percent=True) if finite(value) else "–"


def quantity(value: Any, unit: str) -> Label:
    """A stage's number: a share in percent where it has no unit."""
    if not unit or not finite(value):
        return share(value)
    return Text(f"{number(value)} {unit}", f"{number(value)} {UNITS.get(unit, unit)}")


def times(ratio: float) -> str:
    """How many times as small, as fast."""
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def count(value: Any) -> str:
    """1,049,984 as `1.05 M`."""
    if not finite(value):
        return "–"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e5, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{value:,.0f}"


def memory(value: Any) -> str:
    """Bytes in binary units."""
    if not finite(value):
        return "–"
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.{2 if value < 10 * size else 0}f} {unit}"
    return f"{value:.0f} B"


def minutes(value: Any) -> str:
    return f"{value:.1f}" if finite(value) else "–"


def seconds(value: Any) -> str:
    if not finite(value):
        return "–"
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def detail_value(name: str, value: Any) -> str:
    """A number of a stage's free-form details, by what its name says it is."""
    if not finite(value):
        return str(value)
    if name in SHARES:
        return number(value, percent=True)
    if "bytes" in name:
        return memory(value)
    return count(value) if abs(value) >= 100 or isinstance(value, int) else number(value)
