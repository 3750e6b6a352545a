"""`pellucid train distill`: a student learns from a teacher, over its verified answers or over its probabilities."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pellucid.cli.base import OpensModel, prepare
from pellucid.cli.processes import started_by_others
from pellucid.errors import BadInput

if TYPE_CHECKING:
    import torch

    from pellucid.align.teachers import Teacher
    from pellucid.data.packing import Packed
    from pellucid.nn import Decoder
    from pellucid.tasks import Task
    from pellucid.tokenizers import Tokenizer
    from pellucid.train import Evaluate, Run
    from pellucid.train.ranks import Ranks


@dataclass(frozen=True)
class Distill(OpensModel):
    """Distil a teacher into a student on verifiable tasks: its right answers (traces), or its probabilities.
    在可验证任务上把教师蒸馏到学生：学其验证正确的回答（traces），或学其概率分布。

    $ pellucid train distill --teacher runs/large/model --student runs/grow/model --task arithmetic --minutes 3
    $ pellucid train distill --teacher http://localhost:8000/v1 --teacher-model qwen3-8b --student runs/grow/model --task countdown
    """

    teacher: str
    """A model folder, a Hub id, or the address of an OpenAI-compatible endpoint (its key: --key-from).
    教师：模型目录、Hub id，或 OpenAI 兼容接口的地址（密钥见 --key-from）。"""
    student: str
    """Checkpoint that learns: a folder or a Hub id.
    学生检查点：目录或 Hub id。"""
    task: tuple[str, ...] = ("arithmetic",)
    """Tasks, in equal shares; also module:Class or file.py:Class.
    任务（等比例）；也可用 module:Class 或 file.py:Class。"""
    method: Literal["traces", "on-policy", "logits"] = "traces"
    """traces: fine-tuning on the teacher's verified answers; on-policy: its probabilities on the student's samples; logits:
    its probabilities on its own traces. The last two need a local teacher with the student's vocabulary.
    traces：在教师验证正确的回答上微调；on-policy：学生采样、学教师概率；logits：在教师轨迹上学其概率。后两者需同词表的本地教师。"""
    out: Path = Path("runs/distill")
    """Folder for traces, model, log, report and the resume state.
    轨迹、模型、日志、报告与续训状态的目录。"""
    teacher_model: str = ""
    """Name of the endpoint's model.
    接口上的模型名。"""
    key_from: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; it is never written or shown.
    保存接口密钥的环境变量；密钥不会被写出或显示。"""
    timeout: float = 600.0
    """Seconds that the endpoint has for an answer.
    接口每次回答的时限（秒）。"""
    retries: int = 5
    """Repetitions of a request that fails for the moment.
    暂时失败的请求重试次数。"""
    at_once: int = 8
    """Requests under way at once.
    同时进行的请求数。"""
    problems: int = 400
    """Problems that the teacher is asked.
    向教师提问的题数。"""
    samples: int = 4
    """Its answers to each.
    每题的回答数。"""
    keep: int = 2
    """Most right answers kept of each.
    每题最多保留的正确回答数。"""
    teacher_temperature: float = 0.8
    """Of the teacher's answers.
    教师回答的温度。"""
    traces: Path | None = None
    """Use these traces instead of making some.
    使用已有的轨迹文件而不新生成。"""
    traces_only: bool = False
    """Make the traces and stop.
    只生成轨迹。"""
    steps: int | None = None
    """Optimizer steps; or give --minutes.
    优化步数；或用 --minutes。"""
    minutes: float | None = None
    """Length of the training in minutes.
    训练分钟数。"""
    rows: int = 16
    """Packed rows of traces in a step.
    每步的轨迹打包行数。"""
    length: int = 256
    """Tokens in a row.
    每行词元数。"""
    prompts: int = 32
    """on-policy: problems in a step.
    on-policy：每步题数。"""
    max_tokens: int = 100
    """Longest answer, of the teacher and of the student.
    教师与学生的最长回答。"""
    temperature: float = 1.0
    """on-policy: of the student's samples, and of both distributions.
    on-policy：学生采样与两个分布的温度。"""
    beta: float | None = None
    """0: forward KL, 1: reverse KL, between: generalised JSD; by default 1 on-policy and 0 on traces.
    0：前向 KL，1：反向 KL，其间：广义 JSD；默认 on-policy 为 1，轨迹上为 0。"""
    estimate: Literal["full", "top-k", "sampled"] = "full"
    """Over the whole vocabulary, the teacher's likeliest tokens, or the sampled token alone.
    全词表、教师最可能的 k 个词元，或仅采样词元。"""
    top_k: int = 64
    """The k of --estimate top-k.
    --estimate top-k 的 k。"""
    on_policy: float | None = None
    """Share of steps on the student's samples, the others on traces (lambda of GKD); by default all of them with --method on-policy.
    学生采样步的比例，其余用轨迹（GKD 的 lambda）；--method on-policy 时默认全部。"""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """Optimizer.
    优化器。"""
    lr: float = 2e-5
    """Learning rate (about 4e-4 for a model of a million parameters).
    学习率（百万参数的模型约 4e-4）。"""
    evaluate: int = 100
    """Held-out problems of each evaluation.
    每次评测的留出题数。"""
    processes: int = 1
    """Processes that do the training together, each its share of a step (torchrun does as well); one computes the same. Traces are
    made by one process, before.
    共同完成训练的进程数，各做每步的一份（也可用 torchrun 启动）；结果与单进程相同。轨迹须先由单进程生成。"""
    resume: bool = False
    """Go on with the interrupted collection or training in the same folder.
    继续同一目录中被中断的收集或训练。"""


def distill(config: Distill) -> None:
    from pellucid import events
    from pellucid.align import sharing
    from pellucid.align.recording import recorded
    from pellucid.align.rollout import Rollouts
    from pellucid.cli.align_page import report_of
    from pellucid.cli.eval import task_of
    from pellucid.models import load, save
    from pellucid.tasks import evaluate as measure
    from pellucid.tokenizers import Tokenizer
    from pellucid.train.ranks import joined

    on_policy = _check(config)
    device, task = prepare(config), task_of(config.task)
    tokenizer = Tokenizer.load(config.student)
    teacher_model, teacher_tokenizer, teacher = open_teacher(config, task, device)
    if config.method != "traces":
        from pellucid.align.distill import check_vocabularies

        assert teacher_tokenizer is not None
        check_vocabularies(tokenizer, teacher_tokenizer)  # before anything is sampled
    data = None
    if config.traces_only or on_policy < 1:
        traces = make_traces(config, teacher, task)
        if config.traces_only:
            print(f"traces in {traces}")
            return
        data = rows_of(config, tokenizer, traces)
    model = load(config.student, device=str(device), allow_missing=config.allow_missing)
    if config.length > model.spec.context:
        raise BadInput(f"--length {config.length} exceeds the student's context of {model.spec.context}",
                       next=f"use --length {model.spec.context} or less")
    rollouts, ranks = Rollouts(model, tokenizer, task, max_tokens=config.max_tokens), joined()

    def evaluation() -> tuple[str, float, dict[str, Any]]:
        scores = measure(task, sharing.for_evaluation(rollouts, ranks, 0), config.evaluate, 1, 1)
        return "pass@1", scores.pass_at_1, {"format": scores.format, "mean_length": scores.mean_length}

    before = evaluation()[1]
    loop = loop_of(config, model, tokenizer, teacher_model, teacher_tokenizer, task, data, on_policy, evaluation, ranks)
    if config.resume and not loop.resume():
        events.note(f"no training to resume in {config.out}: starting from {config.student}", "warning")
    with recorded(config.out, loop) if ranks.first else contextlib.nullcontext():
        history = loop.run()
    if not ranks.first:
        return
    save(model, config.out / "model", tokenizer=tokenizer)
    after = history.evaluations[-1][1]
    events.emit(events.StageEnd(loop.config.stage, history.seconds, before, after, "greedy accuracy on held-out problems", "", True))
    print(f"held-out accuracy {before:.1%} -> {after:.1%}; model in {config.out / 'model'}; report in {report_of(config.out)}")


def _check(config: Distill) -> float:
    """Refuses what cannot be, before anything is opened; gives the share of on-policy steps."""
    remote = config.teacher.startswith(("http://", "https://"))
    if config.method != "traces" and remote:
        raise BadInput(f"--method {config.method} needs the teacher's probabilities of every token", "an endpoint does not give them",
                       "use --method traces, or a local teacher")
    if remote and not config.teacher_model and config.traces is None:
        raise BadInput("which model of the endpoint?", "its name is missing", "give --teacher-model NAME")
    if config.on_policy is not None and config.method != "on-policy":
        raise BadInput(f"--on-policy has no meaning with --method {config.method}", next="use --method on-policy")
    if config.traces is not None and config.traces_only:
        raise BadInput("--traces and --traces-only exclude each other", "one reads traces, the other makes them", "leave one out")
    if config.traces is not None and not config.traces.is_file():
        raise BadInput(f"there is no file {config.traces}", next="check the path given to --traces")
    on_policy = {"traces": 0.0, "logits": 0.0, "on-policy": 1.0 if config.on_policy is None else config.on_policy}[config.method]
    if (config.processes > 1 or started_by_others()) and (config.traces_only or (on_policy < 1 and config.traces is None)):
        raise BadInput("traces are made by one process", "each of several would make all of them",
                       "make them with --traces-only, then train with --traces FILE --processes N")
    return on_policy


def open_teacher(config: Distill, task: Task, device: torch.device) -> tuple[Decoder | None, Tokenizer | None, Teacher | None]:
    """Model and tokenizer of a local teacher, and who answers. None of them where given traces are all that is needed."""
    from pellucid.align.teachers import EndpointTeacher, LocalTeacher
    from pellucid.models import load
    from pellucid.tokenizers import Tokenizer

    if config.method == "traces" and config.traces is not None:
        return None, None, None
    if config.teacher.startswith(("http://", "https://")):
        return None, None, EndpointTeacher(config.teacher, config.teacher_model, config.max_tokens, config.key_from, config.timeout,
                                           config.retries, config.at_once)
    tokenizer = Tokenizer.load(config.teacher)
    model = load(config.teacher, device=str(device), allow_missing=config.allow_missing)
    return model, tokenizer, LocalTeacher(model, tokenizer, task, max_tokens=config.max_tokens, name=Path(config.teacher).name)


def make_traces(config: Distill, teacher: Teacher | None, task: Task) -> Path:
    from pellucid.align.traces import TraceConfig, collect

    if config.traces is not None:
        return config.traces
    assert teacher is not None
    file = config.out / "traces.jsonl"
    collect(teacher, task, file, TraceConfig(config.problems, config.samples, config.keep, config.teacher_temperature,
                                             seed=config.seed or 0), resume=config.resume)
    return file


def rows_of(config: Distill, tokenizer: Tokenizer, traces: Path) -> Packed:
    """The traces as packed rows, loss on the answers only."""
    from pellucid.align.traces import check_template
    from pellucid.data import chats, packing

    check_template(tokenizer, traces)
    encoded = [tokenizer.encode_chat(chat.messages, tools=chat.tools) for chat in chats.read_chats(traces)]
    return packing.pack_samples(encoded, config.length, overlong="truncate", pad_id=tokenizer.pad_id)


def loop_of(config: Distill, model: Decoder, tokenizer: Tokenizer, teacher: Decoder | None, teacher_tokenizer: Tokenizer | None,
            task: Task, data: Packed | None, on_policy: float, evaluate: Evaluate, ranks: Ranks) -> Run[Any, Any]:
    """The training that the method asks for."""
    from pellucid.align.distill import DistillConfig, DistillLoop
    from pellucid.optim import OptimConfig
    from pellucid.train import Loop, LoopConfig

    seconds = None if config.minutes is None else config.minutes * 60
    steps = config.steps if config.steps is not None or seconds is not None else 100
    common: dict[str, Any] = {"steps": steps, "seconds": seconds, "optim": OptimConfig(config.optimizer, lr=config.lr),
                              "save_seconds": 60.0, "seed": config.seed or 0, "rows": config.rows}
    places: dict[str, Any] = {"evaluate": evaluate, "checkpoint": config.out / "checkpoint", "resume_hint": "the same command with --resume",
                              "ranks": ranks}
    if config.method == "traces":
        assert data is not None
        return Loop(model, data, LoopConfig("distill", **common), tokenizer=tokenizer, **places)
    assert teacher is not None and teacher_tokenizer is not None
    beta = config.beta if config.beta is not None else float(config.method == "on-policy")
    settings = DistillConfig(on_policy=on_policy, beta=beta, estimate=config.estimate, top_k=config.top_k, prompts=config.prompts,
                             max_tokens=config.max_tokens, temperature=config.temperature, **common)
    return DistillLoop(model, tokenizer, teacher, teacher_tokenizer, settings, task=task, data=data, **places)
