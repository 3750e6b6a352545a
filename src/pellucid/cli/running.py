"""Options of the verbs that let a model write: how its weights and its cache are held, and who proposes tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pellucid.cli.base import OpensModel


@dataclass(frozen=True, kw_only=True)
class RunsModel(OpensModel):
    """Options of `serve`, `chat` and `generate`."""

    quantize: Literal["int8", "int4"] | None = None
    """Round the weights while loading, on the CPU: int8, or int4 (matrices in groups of 32; embedding and head as int8).
    加载时量化权重（CPU）：int8，或 int4（矩阵按 32 个一组；嵌入与输出头为 int8）。"""
    draft: str | None = None
    """A smaller checkpoint with the same vocabulary: it proposes tokens, which the model checks in one pass (speculative decoding). The
    answers do not change.
    词表相同的较小检查点：由它猜测词元，模型一次验证（投机解码）；不改变回答。"""
    proposer: Literal["lookup", "mtp"] | None = None
    """Who proposes tokens without a second model: lookup (what followed the last tokens in the request's own text), mtp (the model's own
    layer of multi-token prediction).
    不用第二个模型时由谁猜测：lookup（请求自身文本中接在相同词元之后的内容）、mtp（模型自带的多词元预测层）。"""
    drafts: int | None = None
    """Tokens proposed at a time; 0: none. By default 4 with --draft or --proposer, else none; given alone, lookup proposes.
    每次猜测的词元数；0 表示不猜。给出 --draft 或 --proposer 时默认 4，否则不猜；单独给出时用 lookup。"""

    cache_dtype: Literal["auto", "f32", "bf16", "fp8", "int8"] = "auto"
    """How the cache keeps keys and values: auto (as the model computes), f32, bf16, fp8, int8 (the last two with a scale a token and
    head). In the same memory, fp8 and int8 hold nearly four times the tokens of f32.
    缓存中键和值的数值格式：auto（与模型计算一致）、f32、bf16、fp8、int8（后两者每个词元每个头一个缩放因子）。同样内存下，
    fp8 与 int8 可容纳的词元数接近 f32 的四倍。"""

    def opening(self) -> dict[str, Any]:
        """What `LLM` is told of how to open the model, beside its place."""
        return {"device": self.device, "allow_missing": self.allow_missing, "quantize": self.quantize, "draft": self.draft}

    def proposing(self) -> dict[str, Any]:
        """Fields of `EngineConfig`."""
        return {"drafts": self.drafts, "proposer": self.proposer, "cache_dtype": self.cache_dtype}
