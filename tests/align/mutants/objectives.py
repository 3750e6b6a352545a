"""What is easily done wrong in alignment: baselines, normalisers, clips, estimators, masks, and what several processes share."""

from __future__ import annotations

ADVANTAGES, GDPO, OBJECTIVES, RETURNS, CORRECTIONS, PAIRS, DISTILL, REWARDS, BANDIT, GRADIENTS, METRICS, EXPERTS, RANKS = (
    f"tests/align/test_{name}.py" for name in (
        "objective_advantages", "gdpo", "objectives", "returns", "corrections", "preferences", "distill", "rewards", "bandit_gradients",
        "objective_gradients", "objective_metrics", "expert_alignment", "loop_processes"))
OVERLAP, ADAPTERS = "tests/align/test_overlap.py", "tests/models/test_lora.py"
REWARDS += " -p no:schemathesis"  # its last import may fail behind tests that interrupt threads
SHARES = f"{RANKS} -k shares"
A, T, M = "src/pellucid/align/", "src/pellucid/train/", "src/pellucid/models/"

MUTANTS = [
    # --- advantages
    (A + "groups.py", "present.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()", "present.sum(1, keepdim=True)).clamp(min=1)).sqrt()", ADVANTAGES),
    (A + "groups.py", "return largest > torch.where", "return largest > 1e-9 + torch.where", ADVANTAGES),
    (A + "advantages.py", "centred = centred * n / (n - 1).clamp(min=1)", "centred = centred * (n - 1) / n.clamp(min=1)", ADVANTAGES),
    (A + "advantages.py", '"batch": lambda: group_std(r.reshape(1, -1), present.reshape(1, -1)) + eps', '"batch": lambda: group_std(r, present).mean() + eps', ADVANTAGES),
    (A + "advantages.py", "lead = best.values[:, :1] - best.values[:, 1:]", "lead = best.values[:, :1] - group_mean(r, present)", ADVANTAGES),
    (A + "advantages.py", "total += weight * group_advantages(reward, eps=eps, valid=kept)", "total += group_advantages(weight * reward, eps=eps, valid=kept)", GDPO),
    (A + "advantages.py", "return total.round(decimals=12) + 0.0  # + 0.0: no -0.0", "return total", GDPO),
    (A + "advantages.py", "(variance + eps).rsqrt() if eps_in", "(variance.sqrt() + eps).reciprocal() if eps_in", ADVANTAGES),
    (A + "advantages.py", "/ (n - 1).clamp(min=1)\n    return mean", "/ n.clamp(min=1)\n    return mean", GDPO),
    (A + "advantages.py", "w = torch.where(present, lengths.double(), 0.0)", "w = torch.where(present, 1.0, 0.0)", ADVANTAGES),
    (A + "components.py", "return torch.where(gone, torch.nan, total.round(decimals=12))", "return torch.where(gone, 0.0, total.round(decimals=12))", ADVANTAGES),
    (A + "components.py", "torch.nan, total.round(decimals=12))", "torch.nan, total)", ADVANTAGES),
    (A + "components.py", "kept = torch.where(condition >= at_least, r", "kept = torch.where(condition > at_least, r", GDPO),
    (A + "components.py", "absent & ~absent.all(2, keepdim=True)", "absent", ADVANTAGES),
    (A + "components.py", "if weight != 0]", "]", ADVANTAGES),
    (A + "components.py", "((longest - margin - lengths.double()) / margin).clamp(-1.0, 0.0)", "((longest - margin - lengths.double()) / margin).clamp(max=0.0)", ADVANTAGES),
    (A + "credit.py", "total = total.clamp(-cfg.reward_clip, cfg.reward_clip)", "pass", ADVANTAGES),
    (A + "credit.py", "return torch.where(informative, whiten(raw, weight, **how), 0.0), factor", "return whiten(raw, weight, **how), factor", GDPO),
    # --- policy terms and aggregation
    (A + "policy_losses.py", "clipped = ratio.clamp(1 - low, 1 + high)", "clipped = ratio.clamp(1 - high, 1 + low)", OBJECTIVES),
    (A + "policy_losses.py", "return -torch.minimum(free * advantages, clipped * advantages)", "return -(clipped * advantages)", OBJECTIVES),
    (A + "policy_losses.py", "free = ratio if delta is None else ratio.clamp(max=delta)", "free = ratio", OBJECTIVES),
    (A + "policy_losses.py", "return -ratio.detach().clamp(1 - low, 1 + high) * advantages * logp", "return -ratio.clamp(1 - low, 1 + high) * advantages * logp", OBJECTIVES),
    (A + "policy_losses.py", "return -(4 / tau)", "return -(2 / tau)", OBJECTIVES),
    (A + "policy_losses.py", "torch.where(advantages > 0, tau_pos, tau_neg)", "torch.where(advantages > 0, tau_neg, tau_pos)", OBJECTIVES),
    (A + "policy_losses.py", "whole.detach() + (logp - logp.detach())", "whole + (logp - logp.detach())", GRADIENTS),
    (A + "policy_losses.py", "(sequence_sums if level == \"sequence-sum\" else sequence_means)", "sequence_means", OBJECTIVES),
    (A + "policy_losses.py", "place = (1 - fraction)", "place = fraction", OBJECTIVES),
    (A + "aggregation.py", "return ones / sequence_lengths(sequence)[sequence] / sequences", "return ones / sequences / sequence_lengths(sequence).float().mean()", OBJECTIVES),
    (A + "aggregation.py", "return ones / (sequences * max_tokens)", "return ones / max_tokens", OBJECTIVES),
    (A + "aggregation.py", "if empty == \"count\" else int((lengths > 0).sum())", "if empty == \"count\" else lengths.numel()", OBJECTIVES),
    (A + "aggregation.py", "(sequence_lengths(sequence) > 0).sum() / (sequences * max(sequence.numel(), 1))", "sequence_lengths(sequence).numel() / (sequences * max(sequence.numel(), 1))", OBJECTIVES),
    # --- estimators
    (A + "kl.py", "d = ref - logp\n    return torch.expm1(d) - d", "d = logp - ref\n    return torch.expm1(d) - d", OBJECTIVES),
    (A + "kl.py", "return square - square.detach() + k3(logp, ref).detach()", "return k3(logp, ref)", BANDIT + " " + GRADIENTS + " " + OBJECTIVES),
    (A + "kl.py", "    return ratio * value", "    return ratio.detach() * value", BANDIT + " " + GRADIENTS + " " + OBJECTIVES),
    (A + "kl.py", "logp = ref + (logp - ref).clamp(-bound, bound)", "pass", OBJECTIVES),
    # --- tokens over time
    (A + "returns.py", "next_value = torch.where(here, values[:, t], next_value)", "next_value = values[:, t] * here", RETURNS),
    (A + "returns.py", "delta + gamma * lam * next_advantage, next_advantage)", "delta + lam * next_advantage, next_advantage)", RETURNS),
    (A + "returns.py", "return advantages, torch.where(keep, advantages + values, 0.0)", "return advantages, torch.where(keep, advantages, 0.0)", RETURNS),
    (A + "returns.py", "torch.where(layout.is_last, score.double()[sequence], 0.0)", "torch.where(layout.column == 0, score.double()[sequence], 0.0)", RETURNS),
    (A + "returns.py", "rewards = rewards - beta * kl.detach().double()", "rewards = rewards + beta * kl.detach().double()", RETURNS),
    (A + "value.py", "return torch.maximum(error, (near", "return torch.minimum(error, (near", RETURNS),
    # --- corrections
    (A + "corrections.py", "return torch.where(high >= -low, high, low)[sequence]", "return high[sequence]", CORRECTIONS),
    (A + "corrections.py", ".nan_to_num(nan=0.0)\n    if level", ".nan_to_num(nan=1.0)\n    if level", CORRECTIONS),
    (A + "corrections.py", "torch.where((w >= floor) & (w <= cap), w, 0.0)", "torch.where((w >= floor) & (w <= cap), 1.0, 0.0)", CORRECTIONS),
    (A + "corrections.py", "(advantages >= 0) | (drift <= threshold)", "drift <= threshold", CORRECTIONS),
    (A + "corrections.py", ".clamp(-log_bound, log_bound).exp()", ".exp()", CORRECTIONS),
    # --- preferences
    (A + "preference.py", "/ (1 - 2 * e)", "", PAIRS),
    (A + "preference.py", "return -torch.expm1((-log_ratio)", "return torch.expm1((log_ratio)", PAIRS),
    (A + "preference.py", "F.logsigmoid(-c) / 2 - F.logsigmoid(-r) / 2", "F.logsigmoid(-r) / 2 - F.logsigmoid(-r) / 2", PAIRS),
    (A + "preference.py", "ratio.sort().values - ref.sort().values", "ratio - ref", PAIRS),
    (A + "preference.py", "(F.logsigmoid(x / cfg.tau) - x)", "(F.logsigmoid(x * cfg.tau) - x)", PAIRS),
    (A + "preference.py", "cfg.beta * x - cfg.gamma, cfg.smoothing)", "cfg.beta * (x - cfg.gamma), cfg.smoothing)", PAIRS),
    (A + "unpaired.py", "torch.where(good, cfg.good_weight * (1 - x.sigmoid()), cfg.bad_weight * (1 - (-x).sigmoid()))", "torch.where(good, cfg.good_weight * (1 - x.sigmoid()), cfg.bad_weight * (-x).sigmoid())", PAIRS),
    (A + "unpaired.py", ".mean().clamp(min=0)", ".mean()", PAIRS),
    (A + "reward_losses.py", "centring * (chosen + rejected).square()", "centring * (chosen - rejected).square()", PAIRS),
    # --- distillation
    (A + "divergence.py", "beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)", "(1 - beta) * _kl(teacher, mixture) + beta * _kl(student, mixture)", DISTILL),
    (A + "divergence.py", "student + math.log1p(-beta), teacher + math.log(beta)", "student + math.log(beta), teacher + math.log1p(-beta)", DISTILL),
    (A + "divergence.py", "other = (h @ head.to(h.dtype).mT).to(logits.dtype) / temperature", "other = (h @ head.to(h.dtype).mT).to(logits.dtype)", DISTILL),
    (A + "divergence.py", "return (-torch.expm1(total)).log()", "return torch.expm1(-total).log()", DISTILL),
    (A + "divergence.py", "s = torch.where(valid, student.gather(-1, ids), -torch.inf)", "s = student.gather(-1, ids)", DISTILL),
    (A + "distill.py", "gap = own.detach() - token_logprobs", "gap = own - token_logprobs", DISTILL),
    (A + "distill.py", "values, shown = gap * own, gap", "values, shown = -gap * own, gap", DISTILL),
    (A + "distill.py", "return loss / total", "return loss / max(int((micro.labels != IGNORE).sum()), 1)", DISTILL),
    # --- rewards
    (A + "reward.py", "numbers[name] = math.nan if number is None else float(number)", "numbers[name] = 0.0 if number is None else float(number)", REWARDS),
    (A + "rewards.py", "return {part: reward.weight * own.get(part, 0.0) for part in reward.parts}", "return {part: own.get(part, 0.0) for part in reward.parts}", REWARDS),
    (A + "rewards.py", "whole = scores.extra.setdefault(name, [None] * size)", "whole = scores.extra.setdefault(name, [None] * size) if not failed else [None] * size", REWARDS),
    (A + "rewards.py", "if slow[name] >= PATIENCE:", "if False:", REWARDS),
    # --- experts, processes
    (A + "online.py", "return loss + balance_share(routing, len(at) / max(batch.counts.tokens, 1))", "return loss", EXPERTS),
    (A + "offline.py", "balance_share(routing, len(micro) / len(ids))\n\n        return share, parts\n\n\nclass Unpaired", "balance_share(routing, 1 / len(ids))\n\n        return share, parts\n\n\nclass Unpaired", EXPERTS),
    (T + "ranks.py", "itertools.islice(things, self.rank, None, self.size)", "itertools.islice(things, 0, None, self.size)", SHARES),
    (T + "ranks.py", "max(1, min(most or total, -(-total // self.size)))", "max(1, min(most or total, total))", SHARES),
    # --- samples beside the update
    (A + "sampling.py", "            self.rollouts.hold()", "            pass", OVERLAP),
    (A + "sampling.py", "            self.go_back(self.begun)", "            pass", OVERLAP),
    (A + "sampling.py", "self.abandon(None)  # what", "pass  # what", OVERLAP),
    (A + "online.py", "float(self.history.steps - rollout.step)", "float(rollout.step)", OVERLAP),
    (A + "beside.py", "        if self._halt.is_set():\n", "        if False:\n", OVERLAP),
    (A + "beside.py", "with events.held() as self._told:", "if True:", OVERLAP),
    (A + "rollout.py", "        if self._held:\n", "        if False:\n", OVERLAP),
    # --- adapters of experts
    (M + "lora.py", "adapter.b.permute(1, 2, 0).flatten(1)", "adapter.b.permute(1, 0, 2).flatten(1)", ADAPTERS),
    (M + "lora.py", "(len(order) - 1 - order.index(source))", "order.index(source)", ADAPTERS),
    (M + "lora.py", "words[::-1][depth]", "words[depth]", ADAPTERS),
    ("src/pellucid/nn/lora.py", "torch.baddbmm(self.weight, adapter.b, adapter.a, alpha=self.scale)", "torch.baddbmm(self.weight, adapter.b, adapter.a)", ADAPTERS),
]
