"""What is easily done wrong where processes share feed-forwards: who brings which rows, whose adapter, whose passes."""

from __future__ import annotations

SHARING = "src/pellucid/engine/dp_attention.py"
ADAPTERS = "tests/engine/test_parallel_adapters.py -k without_requests"
DRAFTS = "tests/engine/test_parallel_drafts.py -k nothing_to_propose"
SERVING = "tests/engine/test_parallel_serving.py -k (attention and one_process and tight) or idle_process"
PACKED = "tests/engine/test_parallel_serving.py -k packed"

MUTANTS = [
    (SHARING, "with applied(self.model, None if self.adapters is None else self.adapters.of(None if number == PLAIN else number)):", "with applied(self.model, None):", ADAPTERS),
    (SHARING, "yield mine[0].request.adapter, mine", "yield None, mine", ADAPTERS),
    (SHARING, "(*model.layers, *(ahead.block for ahead in model.mtp))", "model.layers", DRAFTS),
    (SHARING, "return self.within.sum(self.group.sum_of_own(partial[0]))[: self.rows[self.group.rank]].view(self.shape)",
     "return partial[0][: self.rows[self.group.rank]].view(self.shape)", SERVING),
    (SHARING, "self.within.sum(self.group.sum(partial[0])[self._own])", "self.within.sum(partial[0][self._own])", PACKED),
]
