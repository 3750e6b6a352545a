"""What is easily done wrong in latent attention, its indexer, multi-token prediction, and DeepSeek's files."""

from __future__ import annotations

TEST, PARITY, OPS = "tests/models/test_deepseek.py", "tests/models/test_parity.py", "tests/ops/test_latent.py"
INDEX, CACHE = "tests/ops/test_indexer.py", f"{PARITY} -k test_cache and deepseek"
V2, LITE, V3, PLAIN, V32 = (f"{PARITY} -k test_logits and {name}" for name in (
    "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3-plain", "deepseek-v3.2"))
NN, MODELS, MATHS = "src/pellucid/nn/", "src/pellucid/models/", "src/pellucid/ops/"
BLOCK, FAMILY = NN + "latent_attention.py", MODELS + "deepseek.py"

MUTANTS = [
    # --- the two forms
    (MATHS + "latent.py", "k_nope, v = kv[..., :n], kv[..., n:]", "v, k_nope = kv[..., :-n], kv[..., -n:]", OPS),
    (MATHS + "latent.py", "k = torch.cat((k_nope, k_rope.to(dtype).expand(-1, H, -1, -1)), -1)",
     "k = torch.cat((k_rope.to(dtype).expand(-1, H, -1, -1), k_nope), -1)", OPS),
    (MATHS + "latent.py", "scale = (n + q_rope.shape[-1]) ** -0.5 if scale is None else scale", "scale = n**-0.5 if scale is None else scale", OPS),
    (MATHS + "latent.py", "beta=scale, alpha=scale", "beta=1, alpha=scale", OPS),
    (MATHS + "latent.py", "U, V = up[:, :n].to(dtype), up[:, n:].to(dtype)", "U, V = up[:, :n].to(dtype), up[:, -n:].to(dtype)", OPS),
    (MATHS + "latent.py", "scores = scores + mask[:, :, 0]", "pass", OPS),
    (MATHS + "latent.py", "out if blind is None else out.masked_fill(blind, 0.0)", "out", OPS),
    (MATHS + "latent.py", "latent, causal=causal, mask=mask, scale=scale)\n    return torch.einsum", "latent, causal=causal, mask=mask)\n    return torch.einsum", OPS),
    (MATHS + "latent.py", 'choice = "absorbed" if absorbed < expanded else "expanded"', 'choice = "expanded"', OPS),
    # --- the block
    (BLOCK, "self.q_norm = RMSNorm(spec.q_rank, spec.eps)", "self.q_norm = RMSNorm(spec.q_rank, site.eps)", V2),
    (BLOCK, "self.kv_norm = RMSNorm(spec.kv_rank, spec.eps)", "self.kv_norm = RMSNorm(spec.kv_rank, site.eps)", LITE),
    (BLOCK, "entries = self.kv_norm(latent), k_rope", "entries = latent, k_rope", V3),
    (BLOCK, "latent = self.q_norm(self.q_a(x))", "latent = self.q_a(x)", V3),
    (BLOCK, "interleaved=rope.interleaved", "interleaved=True", PLAIN),
    (BLOCK, "interleaved=rope.interleaved", "interleaved=False", V3),
    (BLOCK, "plain, turn = heads.split((heads.shape[-1] - rope.dim, rope.dim), -1)",
     "turn, plain = heads.split((rope.dim, heads.shape[-1] - rope.dim), -1)", V3),
    (BLOCK, "self.scale = head**-0.5 if spec.scale is None else spec.scale", "self.scale = head**-0.5", V3),
    (BLOCK, "spec.kv_rank + spec.rope.dim, spec.bias)", "spec.kv_rank + spec.rope.dim)", PLAIN),
    (BLOCK, "site.dim, spec.bias)\n        self.indexer", "site.dim)\n        self.indexer", PLAIN),
    (BLOCK, "mask=bias, scale=self.scale)", "scale=self.scale)", f"{PARITY} -k test_left_padding and deepseek"),
    # --- the indexer
    (NN + "indexer.py", "return apply_rope(heads, cos, sin, heads_last=True)", "return apply_rope(heads, cos, sin, heads_last=True, interleaved=True)", V32),
    (NN + "indexer.py", "return apply_rope(heads, cos, sin, heads_last=True)",
     "return apply_rope(heads.roll(cos.shape[-1], -1), cos, sin, heads_last=True)", V32),
    (NN + "indexer.py", "return apply_rope(heads, cos, sin, heads_last=True)", "return heads", V32),
    (NN + "indexer.py", "self._turned(self.k_norm(self.k(x))[:, :, None], ctx)", "self._turned(self.k(x)[:, :, None], ctx)", V32),
    (NN + "indexer.py", 'self.weights.wide = ("weight",)', 'self.weights.wide = ()', f"{TEST} -k half_precision"),
    (NN + "experts.py", 'wide = ("select_bias",)', "wide = ()", f"{TEST} -k half_precision"),
    (MATHS + "indexer.py", "k[:, :high].mT).relu_()", "k[:, :high].mT)", INDEX),
    (MATHS + "indexer.py", "scores = scores.masked_fill(~mask, -torch.inf)", "pass", INDEX),
    (MATHS + "indexer.py", "scores.masked_fill_(~visible(b - a, high, device=q.device), -torch.inf)", "scores", INDEX),
    (BLOCK, "mask = chosen_mask(chosen, end) if seen is None else chosen_mask(chosen, end) & seen", "mask = chosen_mask(chosen, end)",
     f"{PARITY} -k test_left_padding and deepseek-v3.2"),
    (BLOCK, "seen = None if ctx.mask is None else ctx.mask[:, 0, :, :end]", "seen = None", f"{PARITY} -k test_left_padding and deepseek-v3.2"),
    (BLOCK, "if end <= indexer.spec.top_k:", "if end > indexer.spec.top_k:", V32),
    (BLOCK, "if end <= indexer.spec.top_k:", "if T == 1 or end <= indexer.spec.top_k:", f"{PARITY} -k test_cache and deepseek-v3.2"),
    (BLOCK, "rows = chosen.mT", "rows = chosen.mT.roll(1, 1)", f"{PARITY} -k test_greedy and deepseek-v3.2"),
    (BLOCK, "bias = bias[:, 0, 0, :end].expand(len(chosen), -1).gather(1, chosen[:, 0])[:, None, None]", "bias = None",
     f"{PARITY} -k test_greedy and deepseek-v3.2"),
    # --- multi-token prediction
    (NN + "mtp.py", "torch.cat((self.norm_embedded(embedded), self.norm_hidden(hidden)), -1)",
     "torch.cat((self.norm_hidden(hidden), self.norm_embedded(embedded)), -1)", f"{TEST} -k further_tokens"),
    (NN + "mtp.py", "return self.norm(self.block.leave(self.block(self.block.enter(x), ctx)))",
     "return self.block.leave(self.block(self.block.enter(x), ctx))", f"{TEST} -k further_tokens"),
    (NN + "mtp.py", "torch.where(behind == ahead, ahead, -1)", "ahead", f"{TEST} -k padded_and_packed"),
    (NN + "mtp.py", "wanted = wanted.masked_fill(same_document(documents, k) < 0, IGNORE)", "pass", f"{TEST} -k padded_and_packed"),
    (NN + "mtp.py", "weight / max(len(states), 1)", "weight", f"{TEST} -k loss_by_hand"),
    (NN + "decoder.py", "mask[:, :-k].bool() & mask[:, k:].bool()", "mask[:, k:].bool()", f"{TEST} -k padded_and_packed"),
    (NN + "decoder.py", "hidden = self.predict(\n                k, tokens[:, k:], hidden[:, :-1]", "hidden = self.predict(\n                k, tokens[:, k:], hidden[:, 1:]",
     f"{TEST} -k further_tokens"),
    (NN + "decoder.py", "            states.append(hidden)", "            states.append(hidden)\n            hidden = hidden.roll(1, 1)", f"{TEST} -k further_tokens"),
    (NN + "count.py", "2 * spec.dim**2 + 3 * norm", "2 * spec.dim**2 + 2 * norm", f"{TEST} -k counts_of_layers"),
    ("src/pellucid/train/loss.py", "if model.training and model.mtp:", "if False:", f"{TEST} -k adds_their_loss"),
    ("src/pellucid/train/loss.py", "if model.training and model.mtp:", "if model.mtp:", f"{TEST} -k adds_their_loss"),
    (MODELS + "names.py", '("model.layers.{n}.enorm.weight",)', '("model.layers.{n}.hnorm.weight",)', f"{TEST} -k further_tokens"),
    (MODELS + "names.py", 'source.replace("{i}", "{n}")', "source", f"{TEST} -k further_tokens"),
    (MODELS + "hub.py", 'not weights.hold(model, "mtp.", main_layers(model))', "False", f"{TEST} -k file_lacks"),
    # --- config.json and back
    (FAMILY, "(0.1 * share * math.log(factor) + 1) ** 2", "(0.1 * share * math.log(factor) + 1)", V3),
    (FAMILY, 'scaling.get("mscale_all_dim", 0.0)', 'scaling.get("mscale", 0.0)', LITE),
    (FAMILY, "if factor > 1 else 1.0", "if True else 1.0", f"{TEST} -k second_temperature"),
    (FAMILY, "rope = replace(c.rope(r), interleaved=pairs)", "rope = replace(c.rope(r), interleaved=True)", PLAIN),
    (FAMILY, 'if c.fields.get("q_lora_rank", 0) is not None else None', 'if c.get("q_lora_rank", 0) else None', f"{TEST} -k what_config_leaves_out"),
    (FAMILY, "shared=hidden * c.whole(", "shared=c.whole(", V2),
    (FAMILY, "wide_router=True", "wide_router=False", f"{TEST} -k half_precision"),
    (FAMILY, 'score="sigmoid"', 'score="softmax"', V3),
    (FAMILY, 'group_score="top2"', 'group_score="max"', V3),
    (FAMILY, "select_bias=True", "select_bias=False", V3),
    (FAMILY, 'renormalize=bool(c.get("norm_topk_prob", True))', "renormalize=True", PLAIN),
    (FAMILY, 'renormalize=bool(c.get("norm_topk_prob", True))', "renormalize=False", V3),
    (FAMILY, 'scale=c.number("routed_scaling_factor", 1.0)', "scale=1.0", V2),
    (FAMILY, 'scale=c.number("routed_scaling_factor", 2.5)', "scale=1.0", V3),
    (FAMILY, 'limited = c.one_of("topk_method", "greedy", ("greedy", "group_limited_greedy")) == "group_limited_greedy"', "limited = False", V2),
    (FAMILY, "i >= first and i % every == 0", "i >= first and (i - first) % every == 0", f"{TEST} -k which_layers_are_sparse"),
    (FAMILY, "i >= first and i % every == 0", "i > first and i % every == 0", V3),
    (FAMILY, '"rope_interleave": spec.layers[0].mixer.rope.interleaved,', "", f"{PARITY} -k transformers_opens and deepseek-v3-plain"),
    (FAMILY, '"n_shared_experts": moe.shared // moe.hidden', '"n_shared_experts": 1', f"{PARITY} -k transformers_opens and deepseek-v2"),
    # --- the last bit of a frequency
    (MATHS + "rope.py", "f = 1.0 / periods", "f = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)", "tests/models/test_rope_scaling.py"),
]
