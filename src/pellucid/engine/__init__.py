"""Generation: a contiguous cache, a batch-wide sampler, `LLM`."""

from pellucid.engine.async_llm import AsyncLLM
from pellucid.engine.batch import Batch, Sample, run_all
from pellucid.engine.llm import LLM, Chunk, Completion, RequestOutput
from pellucid.engine.params import SamplingParams
from pellucid.engine.translate import Translation, translate

__all__ = ["LLM", "AsyncLLM", "Batch", "Chunk", "Completion", "RequestOutput", "Sample", "SamplingParams", "Translation", "run_all", "translate"]
