"""verl 0.9.1's core algorithms, imported without what verl needs to run (ray, tensordict, vllm ...).

    pip install --no-deps verl==0.9.1

Missing packages are answered by empty modules while verl is imported, and taken away again, so that no other library
believes that it has them. Nothing of verl is changed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from functools import cache

MISSING = ("ray tensordict omegaconf hydra codetiming torchdata peft vllm sglang megatron flash_attn liger_kernel wandb orjson "
           "zmq cachetools pylatexenc torch_npu transfer_queue").split()


class _Empty(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last: a package that is installed is found before."""

    def __init__(self):
        self.made: list[str] = []

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in MISSING else None

    def create_module(self, spec):
        self.made.append(spec.name)
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def installed() -> bool:
    return importlib.util.find_spec("verl") is not None


@cache
def load(name: str = "verl.trainer.ppo.core_algos") -> types.ModuleType:
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for made in finder.made:
            sys.modules.pop(made, None)
