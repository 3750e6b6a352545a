"""pellucid: the whole LLM stack, from softmax to agents, as one readable Python package that really runs.

The public face is lazy: `import pellucid` costs milliseconds and brings in neither torch nor any room;
the first use of a name imports the module that holds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

FACE = {  # public name -> the module that holds it under the same name
    "load": "pellucid.models.hub",
    "save": "pellucid.models.hub",
    "Tokenizer": "pellucid.tokenizers",
    "LLM": "pellucid.engine",
    "AsyncLLM": "pellucid.engine",
    "SamplingParams": "pellucid.engine",
    "inspect": "pellucid.plan.inspect",
}

if TYPE_CHECKING:
    from pellucid.engine import LLM as LLM
    from pellucid.engine import AsyncLLM as AsyncLLM
    from pellucid.engine import SamplingParams as SamplingParams
    from pellucid.models.hub import load as load
    from pellucid.models.hub import save as save
    from pellucid.plan.inspect import inspect as inspect
    from pellucid.tokenizers import Tokenizer as Tokenizer


def __getattr__(name: str) -> Any:
    if name not in FACE:
        raise AttributeError(f"module 'pellucid' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(FACE[name]), name)
    globals()[name] = value  # found once; the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *FACE})
