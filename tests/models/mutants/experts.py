"""What is easily done wrong in routers, experts, their balance, and the families that have them."""

from __future__ import annotations

ROUTER, OPS, BALANCE, FP4 = (f"tests/ops/test_{name}.py" for name in ("router", "experts", "balance", "mxfp4"))
BLOCK, FAMILIES, TRAINING = "tests/nn/test_expert_block.py", "tests/models/test_expert_families.py", "tests/train/test_expert_training.py"
PARITY = "tests/models/test_parity.py -k "
MIXTRAL, QWEN2, QWEN3, OSS = (f"{PARITY}test_logits and {name}" for name in ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"))
MATHS, NN, MODELS, TRAIN = (f"src/pellucid/{room}/" for room in ("ops", "nn", "models", "train"))
PLAIN, FEW, COMPILED = (f"{OPS} -k {part}" for part in ("plain or hand or pairs or expert_drops", "few_equals", "compiled and clamped"))

MUTANTS = [
    # --- routers
    (MATHS + "router.py", "weights = scores.gather(1, chosen)", "weights = choice.gather(1, chosen)", ROUTER),
    (MATHS + "router.py", "outside[..., None], -torch.inf", "outside[..., None], 0.0", ROUTER),
    (MATHS + "router.py", '1 if group_score == "max" else', "1 if True else", ROUTER),
    (MATHS + "router.py", '1 if group_score == "max" else', "1 if False else", ROUTER),
    (MATHS + "router.py", 'if score == "top_k_softmax":', 'if score == "nothing":', ROUTER),
    (MATHS + "router.py", "    if renormalize:", "    if True:", ROUTER),
    (MATHS + "router.py", "keepdim=True) + 1e-20)", "keepdim=True))", ROUTER),
    (MATHS + "router.py", "weights if scale == 1 else weights * scale", "weights", ROUTER),
    (MATHS + "router.py", "wide = logits.to(torch.promote_types(logits.dtype, torch.float32))", "wide = logits", ROUTER),
    (MATHS + "router.py", 'wide.sigmoid() if score == "sigmoid"', 'wide.softmax(-1) if score == "sigmoid"', ROUTER),
    (MATHS + "router.py", "scores = scores.masked_fill(~real[:, None], 0)", "pass", ROUTER),
    # --- pairs
    (MATHS + "dispatch.py", "Pairs(order % N,", "Pairs(order // chosen.shape[1],", PLAIN),
    (MATHS + "dispatch.py", "masked_fill(~real, experts)", "masked_fill(~real, 0)", PLAIN),
    (MATHS + "dispatch.py", "device=ids.device) < capacity for n", "device=ids.device) >= n - capacity for n", PLAIN),
    (MATHS + "dispatch.py", "math.ceil(factor", "int(factor", PLAIN),
    (MATHS + "dispatch.py", "order = order[: sum(counts)]", "order = torch.cat([p[(p % N).argsort(stable=True)] for p in order[: sum(counts)].split(counts)])", PLAIN),
    # --- experts
    (MATHS + "experts.py", "gate.clamp(max=limit)", "gate.clamp(-limit, limit)", PLAIN),
    (MATHS + "experts.py", "return (up + 1) *", "return up *", PLAIN),
    (MATHS + "experts.py", "rows[a:b].addr_(weights[a:b].to(x.dtype), ", "rows[a:b].addr_(torch.ones_like(weights[a:b]).to(x.dtype), ", PLAIN),
    (MATHS + "experts.py", "d_weights[here][a:b] += d_rows[a:b] @", "d_weights[here][a:b] += 0 * d_rows[a:b] @", PLAIN),
    (MATHS + "experts.py", "self.total[e], not self.seen[e]", "self.total[e], True", PLAIN),
    (MATHS + "experts.py", "self.total[e].zero_()", "self.total[e].fill_(1)", PLAIN),
    (MATHS + "experts.py", "d_weights += (g * h).sum(-1)", "d_weights += (out * g).sum(-1)", PLAIN),
    (MATHS + "jit/experts.py", "g, u = min(gate, limit), min(max(up, -limit), limit)", "g, u = min(max(gate, -limit), limit), min(max(up, -limit), limit)", FEW),
    (MATHS + "jit/experts.py", "g0, u0, g1, u1 = sums", "u0, g0, u1, g1 = sums", FEW),
    (MATHS + "jit/experts.py", "out[p, d] += weights[p] * wide(shift[d])", "out[p, d] += wide(shift[d])", FEW),
    (MATHS + "jit/experts.py", "(rise if x <= top else np.float32(0))", "rise", COMPILED),
    (MATHS + "jit/experts.py", "(c * s if abs(u) <= top else np.float32(0))", "(c * s)", COMPILED),
    # --- the block
    (NN + "experts.py", "if self.spec.wide_router else x.dtype", "if False else x.dtype", BLOCK),
    (NN + "experts.py", "self.select_bias.data = before.to(self.select_bias.device)", "pass", BLOCK),
    (NN + "experts.py", "torch.sigmoid(self.shared_gate(x)) * same", "self.shared_gate(x) * same", BLOCK),
    (NN + "experts.py", "if s.capacity is not None and self.training else None", "if s.capacity is not None else None", BLOCK),
    (NN + "experts.py", "(ctx.documents >= 0).flatten()", "(ctx.documents >= -1).flatten()", BLOCK),
    (NN + "experts.py", "learning = self.training and torch.is_grad_enabled()", "learning = self.training", BLOCK),
    (NN + "experts.py", "min(N, capacity_of(N, s.experts, s.top_k, s.capacity or 1.0))", "capacity_of(N, s.experts, s.top_k, s.capacity or 1.0)", BLOCK),
    (NN + "experts.py", "if move and module.select_bias is not None:", "if module.select_bias is not None:", BLOCK),
    (NN + "experts.py", "            module.load = None\n", "            pass\n", BLOCK),
    # --- balance
    (MATHS + "balance.py", "return E * (f * P).sum()", "return (f * P).sum()", BALANCE),
    (MATHS + "balance.py", "len(layer) if real is None else int(real.sum()) for layer", "len(layer) for layer", BALANCE),
    (MATHS + "balance.py", "torch.stack([load(layer, E, real) for", "torch.stack([load(layer, E) for", BALANCE),
    (MATHS + "balance.py", "shares = (wide / wide.sum(-1, keepdim=True)).view", "shares = wide.view", BALANCE),
    (MATHS + "balance.py", "return ((E / k) *", "return (E *", BALANCE),
    (MATHS + "balance.py", "shares * seen, given * seen, seen.sum(1).clamp_min(1)", "shares * seen, given * seen, lengths", BALANCE),
    (MATHS + "balance.py", "layer.logsumexp(-1).square()", "layer.logsumexp(-1)", BALANCE),
    (MATHS + "balance.py", "torch.sign(load.mean() - load)", "torch.sign(load - load.mean())", BALANCE),
    (MATHS + "balance.py", "torch.sign(load.mean() - load)", "(load.mean() - load)", BALANCE),
    # --- training
    (TRAIN + "loss.py", "loss + count * balance", "loss + balance", TRAINING),
    (TRAIN + "loss.py", "if model.training and balanced(model.spec)", "if balanced(model.spec)", TRAINING),
    (TRAIN + "step.py", "move=finite", "move=True", TRAINING),
    ("src/pellucid/optim/muon.py", "zip(direction.split(rows, -2), p.split(rows, -2))", "zip([direction], [p])", TRAINING),
    # --- families
    (MODELS + "mixtral.py", "renormalize=True", "renormalize=False", MIXTRAL),
    (MODELS + "mixtral.py", "theta=1e6", "theta=1e4", FAMILIES),
    (MODELS + "names.py", '("w1", "w3", "w2")', '("w3", "w1", "w2")', MIXTRAL),
    (MODELS + "qwen_moe.py", "i % 2 == 0 and i < few", "i % 2 == 0", FAMILIES),
    (MODELS + "qwen_moe.py", "i % 2 == 0 and i < few", "i >= few", FAMILIES),
    (MODELS + "qwen_moe.py", "(i + 1) % step == 0", "i % step == 0", FAMILIES),
    (MODELS + "qwen_moe.py", 'c.get("norm_topk_prob", False)', 'c.get("norm_topk_prob", True)', FAMILIES),
    (MODELS + "qwen_moe.py", 'c.get("norm_topk_prob", False)', 'c.get("nothing", False)', QWEN3),
    (MODELS + "qwen_moe.py", "shared_gate=True", "shared_gate=False", QWEN2),
    (MODELS + "qwen_moe.py", 'c.get("qkv_bias", True)', 'c.get("qkv_bias", False)', FAMILIES),
    (MODELS + "qwen_moe.py", "qk_norm=True, window=window", "qk_norm=True", FAMILIES),
    (MODELS + "config.py", '"num_experts" if self.get("num_experts") is not None else "num_local_experts"', '"num_experts"', FAMILIES),
    (MODELS + "gpt_oss.py", "FULL if i % 2 else SLIDING", "SLIDING if i % 2 else FULL", FAMILIES),
    (MODELS + "gpt_oss.py", 'score="top_k_softmax"', 'score="softmax"', OSS),
    (MODELS + "gpt_oss.py", "sinks=True", "sinks=False", OSS),
    (MODELS + "gpt_oss.py", '"truncate": False', '"truncate": True', FAMILIES),
    (MODELS + "gpt_oss.py", 'c.number("swiglu_limit", 7.0)', 'c.number("nothing", 7.0)', OSS),
    (MODELS + "names.py", "gate_up_proj^T^interleaved", "gate_up_proj^T", OSS),
    (MODELS + "names.py", "gate_up_proj_bias^interleaved", "gate_up_proj_bias", OSS),
    (MATHS + "mxfp4.py", "(E2M1[byte & 15], E2M1[byte >> 4])", "(E2M1[byte >> 4], E2M1[byte & 15])", FP4),
    (MATHS + "mxfp4.py", "2.0 ** (byte - 127)", "2.0 ** (byte - 128)", FP4),
]
