"""pellucid: the whole LLM stack, from softmax to agents, as one readable Python package that really runs."""

__version__ = "0.1.0"
