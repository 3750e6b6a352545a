"""What is easily done wrong in what an engine computes with: slots, pages, codes of a cache, drafts, draws."""

from __future__ import annotations

ENGINE, SLOT_TABLE, SAMPLER = (f"tests/engine/test_{name}.py" for name in ("engine", "slot_table", "sampler"))
WINDOWS, CODES = "tests/engine/test_window_cache.py", "tests/ops/test_cache_codes.py"
FLAT = f"{WINDOWS} -k (gpt-oss or gemma3) and (none or pressure)"
PAGES, SLOTS, SPECULATION, DRAW, STOPPING, JOB = (
    f"src/pellucid/engine/{name}.py" for name in ("paged_cache", "slot_table", "speculation", "sampler", "stopping", "job"))
LLM = "tests/engine/test_llm.py"
FORMATS = "src/pellucid/ops/cache_codes.py"

MUTANTS = [
    # --- pages and slots
    (PAGES, "min(self.longest, window - 1 + count)", "min(self.longest, window)", FLAT),
    (PAGES, "starts = (first_needed(group.window, tokens) // self.size * self.size", "starts = (0 * first_needed(group.window, tokens)", f"{WINDOWS} -k tokens_several and swap"),
    (PAGES, "found[name] = rows.masked_fill(fresh", "found[name] = rows.masked_fill(~fresh", "tests/models/test_engine_families.py -k qwen3.5 and plain"),
    (SLOTS, "first = min(-(-start // self.size), r.moved) if", "first = min(start // self.size + 1, r.moved) if", FLAT),
    (SLOTS, "row, last, r.moved = self.row(r), -(-stop // self.size), UNMOVED", "row, last, r.moved = self.row(r), stop // self.size, UNMOVED", FLAT),
    (SLOTS, "            self.slots[i][: old.shape[0], : old.shape[1]] = old\n", "", SLOT_TABLE),
    # --- codes
    (FORMATS, "wide / scales.float()[..., None]", "wide * scales.float()[..., None]", CODES),
    (FORMATS, ".clamp_min(TINY)", "", CODES),
    (FORMATS, "width * self.kept.itemsize + 2 *", "width * self.kept.itemsize + 0 *", CODES),
    # --- speculation and sampler
    (STOPPING, "max(0, known - len(s) + 1)", "0", f"{LLM} -k too_early"),
    (STOPPING, "max(0, known - len(s) + 1)", "max(0, known)", LLM),
    (STOPPING, 'rstrip("\\ufffd")', "rstrip()", LLM),
    (JOB, ", self.params) - self._shown)", ", self.params))", f"{LLM} -k too_early"),
    (SPECULATION, "return list(drawn[: same + 1])", "return list(drawn[:same])", ENGINE),
    (SPECULATION, "if p != d), len(proposed))", "if p == d), len(proposed))", ENGINE),
    (SPECULATION, "return r.tokens[place : place + most]", "return r.tokens[place + 1 : place + 1 + most]", ENGINE),
    (DRAW, "z = (z ^ _shift(z, 27)) * _MIX[1]", "z = z * _MIX[1]", SAMPLER),
    (DRAW, "off_k = (top_k[:, None] > 0) & (rank >= top_k[:, None])", "off_k = (top_k[:, None] > 0) & (rank > top_k[:, None])", SAMPLER),
    (DRAW, "before = (ordered.cumsum(-1) - ordered)", "before = ordered.cumsum(-1)", SAMPLER),
    (DRAW, "probs < self.min_p[rows][:, None] * probs.amax(-1, keepdim=True)", "probs < self.min_p[rows][:, None]", SAMPLER),
    (DRAW, "tokens = torch.where(greedy, logits.argmax(-1), tokens)", "pass", "tests/engine/test_compiled.py -k draws_are_the_twins and 1000"),
    (DRAW, "(p.gather(-1, index).cumsum(-1) < mass[:, None])", "(p.gather(-1, index).cumsum(-1) <= mass[:, None] / 2)", SAMPLER),
]
