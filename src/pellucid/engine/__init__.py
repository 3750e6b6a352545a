"""Generation: a contiguous cache, a batch-wide sampler, `LLM`."""

from pellucid.engine.batch import Batch, Sample, run_all
from pellucid.engine.llm import LLM, Chunk, Completion, RequestOutput
from pellucid.engine.params import SamplingParams
from pellucid.engine.translate import Translation, translate

__all__ = ["LLM", "Batch", "Chunk", "Completion", "RequestOutput", "Sample", "SamplingParams", "Translation", "run_all", "translate"]
