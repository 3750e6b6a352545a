"""`pellucid VERB TARGET --options`: find the verb, import its one file, run it; failures become exit codes.

Exit codes: 0 done, 1 failed, 2 bad arguments, 130 interrupted. `pellucid --help` imports no verb.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verb:
    """One line of the table: where the function is ("module:function"), what it does; `parts` where it has kinds."""

    target: str
    en: str
    zh: str
    parts: dict[str, Verb] = field(default_factory=dict)


VERBS = {
    "grow": Verb("pellucid.cli.grow:grow",
                 "from raw text to a small model that reasons: every stage, measured, in minutes",
                 "从原始文本到会推理的小模型：几分钟走完每个阶段，步步有测量"),
    "chat": Verb("pellucid.cli.chat:chat", "talk to a model in the terminal", "在终端里与模型对话"),
    "generate": Verb("pellucid.cli.generate:generate", "complete a prompt, or a file of prompts",
                     "续写一个或一批提示"),
    "serve": Verb("pellucid.cli.serve:serve", "an OpenAI-compatible server for a model",
                  "以 OpenAI 兼容接口提供模型服务"),
    "train": Verb("", "make a model better on data", "用数据训练模型", {
        "pretrain": Verb("pellucid.cli.train:pretrain", "language modelling on raw text", "在原始文本上做语言建模"),
        "sft": Verb("pellucid.cli.train:sft", "supervised fine-tuning on conversations", "在对话数据上做监督微调"),
        "distill": Verb("pellucid.cli.distill:distill", "a student learns from a teacher's verified answers or probabilities",
                        "学生从教师验证正确的回答或其概率分布中学习"),
    }),
    "align": Verb("", "make a model better by rewards", "用奖励对齐模型", {
        "dpo": Verb("pellucid.cli.align_offline:dpo", "preferences in pairs: DPO and its family", "成对偏好：DPO 及其同族"),
        "kto": Verb("pellucid.cli.align_offline:kto", "single answers labelled good or bad", "单个标注好坏的回答"),
        "rm": Verb("pellucid.cli.align_offline:rm", "a reward model from pairs", "从成对数据训练奖励模型"),
        "prm": Verb("pellucid.cli.align_offline:prm", "a process reward model from solutions judged step by step", "从逐步标注的解答训练过程奖励模型"),
        "grpo": Verb("pellucid.cli.align_methods:grpo", "group-relative policy optimisation", "组相对策略优化"),
        "ppo": Verb("pellucid.cli.align_methods:ppo", "proximal policy optimisation, with a critic", "带价值网络的近端策略优化"),
        "dr-grpo": Verb("pellucid.cli.align_methods:dr_grpo", "GRPO without its biases of length and difficulty", "去除长度与难度偏差的 GRPO"),
        "dapo": Verb("pellucid.cli.align_methods:dapo", "clip-higher, token mean, dynamic sampling", "上截断放宽、词元平均、动态采样"),
        "gspo": Verb("pellucid.cli.align_methods:gspo", "the ratio of whole completions", "以整个回答计比率"),
        "gdpo": Verb("pellucid.cli.align_methods:gdpo", "several rewards, each normalised by itself", "多个奖励各自归一"),
        "rloo": Verb("pellucid.cli.align_methods:rloo", "REINFORCE against the others of the group", "以组内其余为基线的 REINFORCE"),
        "reinforce++": Verb("pellucid.cli.align_methods:reinforce", "REINFORCE normalised over the batch", "批内归一的 REINFORCE"),
        "reinforce++-baseline": Verb("pellucid.cli.align_methods:reinforce_baseline", "the same with groups", "同上，带组内基线"),
        "cispo": Verb("pellucid.cli.align_methods:cispo", "capped importance weights", "限制重要性权重"),
        "sapo": Verb("pellucid.cli.align_methods:sapo", "a soft gate in place of the clip", "以软门控代替截断"),
        "trl-default": Verb("pellucid.cli.align_methods:trl_default", "what trl computes by default", "trl 的默认目标"),
        "verl-default": Verb("pellucid.cli.align_methods:verl_default", "what verl computes by default", "verl 的默认目标"),
        "inspect": Verb("pellucid.cli.align_inspect:inspect", "look into a run: alarms, completions side by side, tokens",
                        "查看一次运行：警报、并排的回答、逐词元数值"),
    }),
    "eval": Verb("pellucid.cli.eval:evaluate", "held-out numbers: bits per byte, pass@1, pass@k, format, length",
                 "留出集上的数字：每字节比特、pass@1、pass@k、格式、长度"),
    "quantize": Verb("pellucid.cli.quantize:quantize", "smaller weights, and what they cost",
                     "压缩权重，并测出代价"),
    "inspect": Verb("pellucid.cli.inspect:inspect", "what is in this model: parameters, memory, FLOPs",
                    "模型里有什么：参数、内存、计算量"),
    "bench": Verb("", "measured comparisons with the tools one would otherwise use", "与常用工具的实测对比", {
        "grow": Verb("pellucid.cli.bench:grow", "the main job over several seeds", "多个随机种子重复主任务"),
        "train": Verb("pellucid.cli.bench:train", "training tokens/s", "训练速度（词元/秒）"),
        "align": Verb("pellucid.cli.bench:align", "a step of GRPO, rollout and update", "GRPO 一步（采样与更新）"),
        "sample": Verb("pellucid.cli.bench:sample", "batched sampling tokens/s", "批量采样速度（词元/秒）"),
        "serve": Verb("pellucid.cli.bench:serve", "the engine beside transformers, llama.cpp, OpenVINO, vLLM", "推理引擎与 transformers、llama.cpp、OpenVINO、vLLM 对比"),
        "quality": Verb("pellucid.cli.bench:quality", "perplexity of INT8 and INT4 weights beside bfloat16", "INT8、INT4 权重与 bfloat16 的困惑度对比"),
        "gpu": Verb("pellucid.cli.bench:gpu", "the engine on a GPU beside transformers' continuous batching", "GPU 上的推理引擎与 transformers 连续批处理对比"),
        "spread": Verb("pellucid.cli.bench:spread", "one model on several processes: latency between tokens, room of the cache",
                       "一个模型分布在多个进程：词元间延迟与缓存容量"),
        "load": Verb("pellucid.cli.bench:load", "time and memory of loading a checkpoint", "加载检查点的时间与内存"),
        "forward": Verb("pellucid.cli.bench:forward", "dense, expert and latent-attention models, tokens/s", "稠密、专家与潜在注意力模型的速度（词元/秒）"),
        "parity": Verb("pellucid.cli.bench:parity", "largest difference from transformers, by family", "各模型家族与 transformers 的最大差异"),
        "tokenizer": Verb("pellucid.cli.bench:tokenizer", "tokenizer training and encoding",
                          "分词器的训练与编码速度"),
    }),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    from pellucid import messages
    from pellucid.runtime import ask_for_large_pages, spin_briefly

    spin_briefly()
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character must not end the run
            stream.reconfigure(errors="backslashreplace")
    try:
        messages.set_language(_asked_language(argv))
        while argv and argv[0].startswith("--lang"):  # `pellucid --lang zh VERB`: before the verb as well as after it
            argv = argv[1:] if "=" in argv[0] else argv[2:]
        if argv[:1] in (["serve"], ["chat"], ["generate"]):
            ask_for_large_pages()
        code = dispatch(argv)
        sys.stdout.flush()  # here and not when the interpreter ends, so that a closed pipe is met in this `try`
        return code
    except (Exception, KeyboardInterrupt) as error:
        from pellucid.cli.failures import report

        return report(error, as_json="--json" in argv)


def dispatch(argv: list[str]) -> int:
    from pellucid.messages import say

    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_page())
        return 0
    if argv[0] in ("-V", "--version"):
        import pellucid

        print(f"pellucid {pellucid.__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in VERBS:
        raise _unknown(say("error.verb", verb=name), name, list(VERBS), say("error.see_all"))
    verb = VERBS[name]
    if not verb.parts:
        return _run(verb, name, rest)
    if rest and rest[0] in ("-h", "--help"):
        print(_page(name))
        return 0
    parts = ", ".join(verb.parts)
    if not rest or rest[0].startswith("-"):
        from pellucid.errors import BadInput

        raise BadInput(say("error.no_part", verb=name, parts=parts), next=say("error.see", verb=name))
    if rest[0] not in verb.parts:
        raise _unknown(say("error.part", verb=name, part=rest[0]), rest[0], list(verb.parts),
                       say("error.see", verb=name))
    return _run(verb.parts[rest[0]], f"{name} {rest[0]}", rest[1:])


def _run(verb: Verb, name: str, argv: list[str]) -> int:
    import importlib

    from pellucid.cli.base import config_class_of, run

    module, function_name = verb.target.split(":")
    function = getattr(importlib.import_module(module), function_name)
    return run(config_class_of(function), function, argv, name)


def _page(name: str | None = None) -> str:
    """The help page of the program, or of a verb with several kinds."""
    import pellucid
    from pellucid.messages import pick, say

    table = VERBS[name].parts if name else VERBS
    width = max(map(len, table))
    rows = [f"  {key:<{width}}  {pick(verb.en, verb.zh)}" for key, verb in table.items()]
    if name:
        more = say("help.kind_more", verb=name, kind=next(iter(table)))
        return "\n".join([say("help.parts", verb=name), "", pick(VERBS[name].en, VERBS[name].zh), "", say("help.kinds"), *rows, "", more])
    return "\n".join([say("help.title", version=pellucid.__version__), "", say("help.usage"), "",
                      say("help.verbs"), *rows, "", say("help.start"), say("help.more")])


def _unknown(what: str, word: str, choices: list[str], see: str) -> Exception:
    from pellucid.cli.failures import did_you_mean
    from pellucid.errors import BadInput

    return BadInput(what, next=did_you_mean(word, choices) or see)


def _asked_language(argv: list[str]) -> str | None:
    """`--lang zh` read before anything else, so that help and refusals speak it too; nonsense is refused later."""
    from itertools import zip_longest

    from pellucid.messages import LANGUAGES

    for word, following in zip_longest(argv, argv[1:], fillvalue=""):
        value = following if word == "--lang" else word.removeprefix("--lang=")
        if word.startswith("--lang") and value in LANGUAGES:
            return value
    return None


if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:
        from pellucid.cli import processes

        if processes.started_by_others():
            processes.leave(code)
    sys.exit(code)
