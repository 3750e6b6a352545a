"""The passes of a model's own layer of multi-token prediction (nn/mtp.py), with a cache of its own. Who proposes with it: drafting.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pellucid.engine.paged_cache import Pages, Rows
from pellucid.engine.request import Request
from pellucid.nn import Decoder, prediction_spec
from pellucid.ops.cache_codes import cache_codes


class Predictor:
    """Of depth 1.  Legend: B requests, T tokens of each, D width, V vocabulary."""

    def __init__(self, model: Decoder, blocks: int, size: int, places: int):
        self.model, self.device = model, model.embed.weight.device
        dtype = model.compute_dtype or model.embed.weight.dtype
        self.pages = Pages(prediction_spec(model.spec, 1), blocks, size, places, cache_codes("auto", dtype), self.device)

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], tokens: Sequence[Sequence[int]], states: Tensor) -> Tensor:
        """states (B, T, D) of the places before `tokens` -> (B, T, D). The requests' entries stand up to `computed`; T more are written."""
        n = len(tokens[0])
        rows = Rows(self.pages, requests, n)
        return self.model.predict(1, torch.tensor(tokens, device=self.device), states, rows.positions(n).expand(len(requests), n) + 1,
                                  cache=rows)  # type: ignore[arg-type]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """(B, D) -> (B, V)"""
        return self.model.logits(states)

    def forget(self, request: Request) -> None:
        self.pages.table.forget(request)
