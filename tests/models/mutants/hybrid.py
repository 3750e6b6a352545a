"""What is easily done wrong in the gated delta net, gated attention, Qwen3-Next and 3.5, Qwen v1, and beyond the trained context."""

from __future__ import annotations

OPS, LONG, QWEN1, HYBRID = "tests/ops/test_delta.py", "tests/nn/test_long_context.py", "tests/models/test_qwen1.py", "tests/models/test_hybrid.py"
PARITY = "tests/models/test_parity.py -k test_logits and qwen3"
CACHE, PADDING = "tests/nn/test_cache.py -k delta", "tests/nn/test_cache.py -k test_left_padding and delta"
PACKED, DOORS = "tests/nn/test_packed.py -k delta", "tests/models/test_long_context_models.py"
NEXT, Q35 = f"{PARITY}-next", "tests/models/test_parity.py -k test_logits and qwen3.5"
SINKS = "tests/ops/test_attention.py -k sinks"
NN, MODELS, MATHS = "src/pellucid/nn/", "src/pellucid/models/", "src/pellucid/ops/"
RULE, NET, FAR, V1 = MATHS + "delta.py", NN + "delta_net.py", NN + "long_context.py", MODELS + "qwen1.py"

MUTANTS = [
    # --- the delta rule
    (RULE, "torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)", "1 / (x.square().sum(-1, keepdim=True).sqrt() + eps)", OPS),
    (RULE, "q, k = (x.repeat_interleave(groups, 1) for x in (q, k))", "q, k = (x.repeat(1, groups, 1, 1) for x in (q, k))", OPS),
    (RULE, "(v[:, :, t, None] - key.mT @ S))", "v[:, :, t, None])", OPS),
    (RULE, "(k @ k.mT) * D * weighted", "(k @ k.mT) * weighted", OPS),
    (RULE, "torch.cat((v, (k * in_decay[..., None])), -1) * weighted", "torch.cat((v * weighted, (k * in_decay[..., None])), -1)", OPS),
    (RULE, "written = u[..., n, :, :] - w[..., n, :, :] @ S", "written = u[..., n, :, :]", OPS),
    (RULE, "D, in_decay, out_decay = D * same, in_decay * entered, out_decay * stays", "D, in_decay = D * same, in_decay * entered", OPS),
    (RULE, "in_decay * entered", "in_decay", OPS),
    (RULE, "D * same", "D", OPS),
    (RULE, "return F.pad((documents.diff(dim=1) != 0).cumsum(1), (1, 0))", "return documents", OPS),
    (RULE, "term = term * (number[:, W - 1 :] == number[:, there])[..., None]", "pass", OPS),
    (RULE, "return y.to(x.dtype), padded[:, T:]", "return y.to(x.dtype), padded[:, : W - 1]", OPS),
    # --- the block
    (NET, "x = x * ctx.real[..., None].to(x.dtype)", "pass", PADDING),
    (NET, "self.norm = RMSNorm(spec.v_dim, site.eps)", "self.norm = site.head_norm(spec.v_dim)", NEXT),
    (NET, "return q * s.k_dim**-0.5, k,", "return q, k,", NEXT),
    (NET, "-self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())", "-self.A_log.float().exp() * F.softplus(a.float())", NEXT),
    (NET, "-self.A_log.float().exp()", "-self.A_log.float()", NEXT),
    (NET, 'wide = ("A_log", "dt_bias")', "wide = ()", f"{HYBRID} -k decay_wide"),
    (NN + "count.py", "return 8 * mixer.v_heads * mixer.k_dim * mixer.v_dim", "return 6 * mixer.v_heads * mixer.k_dim * mixer.v_dim", "tests/plan/test_inspect.py -k costs_beside"),
    (MODELS + "qwen_next.py", "LINEAR if (i + 1) % every else FULL", "LINEAR if i % every else FULL", HYBRID),
    (RULE, "else (0, N * C - x.shape[2]))", "else (0, N * C - x.shape[2]), value=0.5)", OPS),
    (NET, "self.heads(F.silu(mixed))", "self.heads(mixed)", NEXT),
    (NET, "F.silu(z.float())", "z.float().sigmoid()", NEXT),
    (NET, 'kept.get("inputs")', "None", CACHE),
    (NET, 'kept.get("memory")', "None", CACHE),
    (NET, 'kept.get("inputs"), ctx.documents)', 'kept.get("inputs"))', PACKED),
    (NET, 'kept.get("memory"), ctx.documents)', 'kept.get("memory"))', PACKED),
    # --- the families
    (MODELS + "names.py", '"in_proj_qkvz.weight[0:4]^grouped"', '"in_proj_qkvz.weight[0:4]"', NEXT),
    (MODELS + "names.py", '"in_proj_ba.weight[4,5]^grouped"', '"in_proj_ba.weight[4,5]"', NEXT),
    (MODELS + "names.py", '"in_proj_b.weight[4]", "in_proj_a.weight[5]"', '"in_proj_b.weight[5]", "in_proj_a.weight[4]"', Q35),
    (MODELS + "names.py", "q_proj.{w}[0,3]^grouped", "q_proj.{w}[0,3]", NEXT),
    (MODELS + "qwen_next.py", 'c.get("partial_rotary_factor", 0.25)', 'c.get("partial_rotary_factor", 1.0)', f"{HYBRID} -k released or multimodal or unsaid"),
    (MODELS + "qwen_next.py", 'norm="rms_centred"', 'norm="rms"', NEXT),
    (MODELS + "qwen_next.py", "shared_gate=True", "shared_gate=False", NEXT),
    (MODELS + "qwen_next.py", '(r"^model\\.language_model\\.", "model."),', "", f"{HYBRID} -k multimodal"),
    (NN + "attention.py", "out * torch.sigmoid(gate)", "out * gate", NEXT),
    # --- Qwen v1
    (MODELS + "names.py", '("mlp.w2", "mlp.w1")', '("mlp.w1", "mlp.w2")', QWEN1),
    (V1, 'MLP(c.need("intermediate_size") // 2', 'MLP(c.need("intermediate_size")', QWEN1),
    (MATHS + "rope.py", "math.ceil(math.log2(length / original) + 1) - 1, 1)", "math.ceil(math.log2(length / original)) - 1, 1)", QWEN1),
    (MATHS + "rope.py", "theta = theta * alpha ** (dim / (dim - 2))", "theta = theta * alpha", QWEN1),
    (MATHS + "rope.py", "math.log(trained)).clamp_min(1.0)", "math.log(trained))", QWEN1),
    (MATHS + "rope.py", "torch.log((positions + 1).float())", "torch.log(positions.clamp_min(1).float())", QWEN1),
    (NN + "context.py", "found = self.positions.amax(-1) + 1", "found = self.positions.amax()[None] + 1", QWEN1),
    (NN + "context.py", "self.cache.began = found", "pass", QWEN1),
    (NN + "attention.py", "self.spec.rope.in_training if self.training else self.spec.rope", "self.spec.rope", QWEN1),
    (NN + "attention.py", "if self.spec.logn and not self.training:", "if self.spec.logn:", QWEN1),
    # --- beyond the context
    (FAR, "(i % s + s).clamp_max(reach.size - 1)", "(i % s + s).clamp_max(reach.size)", LONG),
    (FAR, "torch.full_like(i, reach.size - 1)", "torch.full_like(i, reach.size)", LONG),
    (FAR, "self.turned(k, i % s, ctx), i, ctx.bias", "self.turned(k, i, ctx), i, ctx.bias", LONG),
    (FAR, "i, s = ctx.positions, reach.size - reach.local", "i, s = ctx.positions, reach.size", LONG),
    (FAR, ".clamp(0, 2)", ".clamp(0, 1)", LONG),
    (FAR, "(0.1 * torch.log(length / trained) + 1).clamp_min(1.0)", "(0.1 * torch.log(length / trained) + 1)", LONG),
    (FAR, "length = ctx.positions.amax(-1) + 1", "length = ctx.positions.amax()[None] + 1", LONG),
    (FAR, "length = torch.maximum(length, ctx.cache.began)", "pass", DOORS),
    (MODELS + "config.py", 'fields.whole("original_max_position_embeddings", 0, low=0)', "0", DOORS),
    (MODELS + "families.py", "**f.fields(spec), **dual_chunk_fields(spec)}", "**f.fields(spec)}", DOORS),
    (FAR, "self.turned(q, i.clamp(0, reach - 1), ctx)", "self.turned(q, i, ctx)", LONG),
    (FAR, "((j > i - (reach - s)) | (j < s))", "(j > i - (reach - s))", LONG),
    (FAR, "(j > i - (reach - s))", "(j >= i - (reach - s))", LONG),
    (FAR, "torch.where(j < s, j, j - past)", "j", LONG),
    (FAR, "place = torch.where(place < s, place, s + (place - s) % (reach - s))", "place = place % reach", LONG),
    (FAR, "i = i.masked_fill(~ctx.real, -1)", "pass", "tests/nn/test_cache.py -k test_left_padding and streaming"),
    (FAR, "kept = kept & seen[:, 0]", "pass", "tests/nn/test_packed.py -k streaming"),
    (MATHS + "versions.py", "weights.masked_fill(blind, 0)", "weights", LONG),
    (MODELS + "long_context.py", "reach=Streaming(0, m.window)", "reach=Streaming(0, m.window + 1)", LONG),
    (MODELS + "long_context.py", "scale=(mixer.nope + rope.dim) ** -0.5 * temperature(rope)", "scale=mixer.scale", LONG),
    (NN + "specs.py", "return 2**31 if far", "return self.context if far", DOORS),
    (MATHS + "attention.py", "(sinks / scale).view(K, G)", "sinks.view(K, G)", SINKS),
]
