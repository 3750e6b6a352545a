"""`pellucid bench`: the comparisons of `benchmarks/`, run from a checkout of the repository."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from pellucid.cli.base import Common
from pellucid.errors import PellucidError


@dataclass(frozen=True)
class Bench(Common):
    """Run a measured comparison and keep its figures as JSON. The last line of stdout is the result.
    运行一项实测对比，并将数字存为 JSON；标准输出最后一行即结果。

    $ pellucid bench train --out benchmarks/results/train.json
    """

    out: Path | None = None
    """Where to keep the JSON.
    JSON 的存放位置。"""


@dataclass(frozen=True)
class BenchGrow(Bench):
    """The main job over several seeds.
    多个随机种子重复主任务。

    $ pellucid bench grow --seeds 5 --minutes 8
    """

    seeds: int = 5
    """How many seeds, from 0.
    随机种子个数（从 0 起）。"""
    minutes: float = 8.0
    """Dial of each run.
    每次运行的分钟数。"""


@dataclass(frozen=True)
class BenchServe(Bench):
    """The engine beside transformers, and beside llama.cpp, OpenVINO and vLLM where they are installed.
    推理引擎与 transformers 对比；若已安装，也与 llama.cpp、OpenVINO、vLLM 对比。

    $ pellucid bench serve --peer openvino=/path/to/python --out benchmarks/results/serve.json
    """

    size: str = "30m"
    """Shape of the random model: 30m, or 0.6b (Qwen3-0.6B).
    随机模型的形状：30m，或 0.6b（Qwen3-0.6B）。"""
    rounds: int = 3
    """Rounds of each comparison.
    每项对比的轮数。"""
    peer: tuple[str, ...] = ()
    """NAME=PYTHON: run llama.cpp, openvino or vllm with that Python.
    NAME=PYTHON：用该 Python 运行 llama.cpp、openvino 或 vllm。"""
    batch_rounds: int = 3
    """Of the 16 requests at once, at most.
    其中 16 个并发请求一项最多的轮数。"""
    kinds: tuple[str, ...] = ()
    """Weights of ours that take part: bf16, float32, INT8, INT4; peers with weights as wide.
    参与对比的权重类型：bf16、float32、INT8、INT4；对方取同样位宽。"""
    keep: Path | None = None
    """Folder for the model's files, which a later run takes again; by default a temporary one.
    模型文件的目录，供以后的运行复用；默认使用临时目录。"""


@dataclass(frozen=True)
class BenchQuality(Bench):
    """What INT8 and INT4 weights cost in perplexity, on a model trained for it here, or on yours.
    INT8 与 INT4 权重在困惑度上的代价：在此训练的模型上，或在给定的模型上。

    $ pellucid bench quality --minutes 12 --out benchmarks/results/quality.json
    """

    model: Path | None = None
    """Measure this model folder instead of training one.
    测量此模型目录，而不另行训练。"""
    minutes: float = 12.0
    """Of training, where no model is given.
    未给出模型时的训练分钟数。"""
    corpus: Path | None = None
    """Text to measure on, all of it; by default the held-out part of Python's own documentation.
    用于测量的文本（全部使用）；默认为 Python 自带文档的留出部分。"""


def quality(config: BenchQuality) -> int:
    given = {"--model": config.model, "--corpus": config.corpus, "--minutes": f"{config.minutes:g}", "--threads": config.threads}
    return _run("quality", config, [str(a) for name, value in given.items() if value is not None for a in (name, value)])


def train(config: Bench) -> int:
    return _run("train", config, [])


def sample(config: Bench) -> int:
    return _run("sample", config, [])


def tokenizer(config: Bench) -> int:
    return _run("tokenizer", config, [])


def load(config: Bench) -> int:
    return _run("load", config, [])


def forward(config: Bench) -> int:
    return _run("forward", config, [])


def parity(config: Bench) -> int:
    return _run("parity", config, [])


def align(config: Bench) -> int:
    return _run("align", config, [])


def serve(config: BenchServe) -> int:
    peers = [a for peer in config.peer for a in ("--peer", peer)]
    kinds, keep = ["--kinds", *config.kinds] if config.kinds else [], ["--keep", str(config.keep)] if config.keep else []
    return _run("serve", config, ["--size", config.size, "--rounds", str(config.rounds), "--batch-rounds", str(config.batch_rounds), *peers, *kinds, *keep])


def gpu(config: Bench) -> int:
    return _run("gpu_serve", config, [])


def spread(config: Bench) -> int:
    return _run("spread", config, [])


def grow(config: BenchGrow) -> int:
    return _run("grow", config, ["--seeds", str(config.seeds), "--minutes", f"{config.minutes:g}"])


def _run(name: str, config: Bench, extra: list[str]) -> int:
    folder = Path(__file__).parents[3] / "benchmarks"
    file = folder / f"{name}.py"
    if not file.exists():
        raise PellucidError(f"the benchmark {name!r} is not installed", "benchmarks live in the repository, not in the package",
                            "clone the repository, `make venv`, and run the command there")
    sys.path.insert(0, str(folder))  # they share benchmarks/common.py
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    arguments = extra + (["--json", str(config.out)] if config.out else [])
    return int(module.main(arguments) or 0)
