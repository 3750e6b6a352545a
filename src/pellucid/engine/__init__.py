"""Generation: the engine of continuous batching, a static batch for rollouts, `LLM` and `AsyncLLM`."""

from pellucid.engine.async_llm import AsyncLLM
from pellucid.engine.batch import Batch, Sample, run_all
from pellucid.engine.llm import LLM
from pellucid.engine.outputs import Chunk, Completion, RequestOutput
from pellucid.engine.params import SamplingParams, StructuredOutput
from pellucid.engine.translate import Translation, translate

__all__ = ["LLM", "AsyncLLM", "Batch", "Chunk", "Completion", "RequestOutput", "Sample", "SamplingParams",
           "StructuredOutput", "Translation", "run_all", "translate"]
