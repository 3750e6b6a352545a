"""The resolved objective in words that a person can check: a formula in plain text, every choice visible, traps named."""

from __future__ import annotations

from pellucid.align.objective_config import COUNTS_SEQUENCES, ObjectiveConfig


def formula(cfg: ObjectiveConfig) -> str:
    """The resolved objective as a formula in plain text, every choice visible, with notes on known traps.

    >>> print(formula(ObjectiveConfig(clip_high=0.28)))
    minimise  1/N_seq Σ_i 1/|o_i| Σ_t [ -min(r A, clip(r, 0.8, 1.28) A) ]
    r  = p(o_it) / p_old(o_it)
    A  = (R_i - mean_group R) / (std_group R + 0.0001), n - 1 in std; exactly 0 where the group's R are equal
    R  = weighted sum of the reward components; one that nobody graded adds 0
    groups without difference: counted · truncated completions: counted · completions without tokens: not counted
    """
    kl = f" + {_adaptive(cfg.beta, cfg.kl_target)} KL" if cfg.beta else ""
    lines = [f"minimise  {_outer(cfg)} [ {_factor(cfg)}{_policy(cfg)}{kl} ]{_entropy(cfg)}"]
    if cfg.policy in ("clip", "cispo", "sapo") or (cfg.beta and cfg.kl == "k3-corrected"):
        lines.append(f"r  = {_ratio(cfg)}")
    lines += [f"A  = {_advantage(cfg)}", f"R  = {_reward(cfg)}"]
    if cfg.beta:
        bound = f", |d| <= {cfg.kl_bound:g}" if cfg.kl_bound else ""
        lines.append(f"KL = {_KL_TEXT[cfg.kl]} ({cfg.kl}), d = log p_ref - log p{bound}")
    if cfg.kl_target is not None:
        lines.append(f"the weight of the KL grows or shrinks to hold it at {cfg.kl_target:g} (horizon {cfg.kl_horizon})")
    if cfg.correction != "none" or cfg.off_policy is not None or cfg.high_entropy < 1:
        lines.append(f"c  = {_correction(cfg)}")
    if cfg.advantage == "gae":
        lines.append(f"critic: + {cfg.value_coef:g} 1/N_tok Σ_i Σ_t {_critic(cfg)}")
    dead = {"keep": "counted", "drop": f"dropped (must differ: {cfg.live_on})"}[cfg.dead_groups]
    cut = {"keep": "counted", "mask": "masked out of the loss", "zero-reward": "counted, with R = 0"}[cfg.truncated]
    empty = {"exclude": "not counted", "count": "counted as 0"}[cfg.empty]
    lines.append(f"groups without difference: {dead} · truncated completions: {cut}"
                 + (f" · completions without tokens: {empty}" if cfg.aggregation in COUNTS_SEQUENCES else ""))
    return "\n".join(lines + [f"note: {note}" for note in notes(cfg)])


def notes(cfg: ObjectiveConfig) -> list[str]:
    """Known traps of this combination of choices, one sentence each."""
    found = []
    whole = cfg.ratio != "token" or cfg.policy == "gmpo"
    if whole and cfg.aggregation not in ("sequence-mean", "sequence-sum"):
        found.append(f"a sequence ratio with {cfg.aggregation} weighs completions by length; GSPO uses sequence-mean")
    if cfg.aggregation == "constant" and cfg.scale != "none" and cfg.advantage == "group":
        found.append("a constant normaliser with a divided advantage is half of Dr. GRPO; it also has scale='none'")
    if cfg.aggregation == "token-mean-local":
        found.append("token-mean-local depends on how the step is cut into micro-batches")
    if cfg.beta and cfg.kl in ("k1", "k3"):
        found.append({"k1": "the mean gradient of k1 as a loss is zero: it does not hold the policy back",
                      "k3": "the gradient of k3 as a loss is that of KL(ref || p), not of KL(p || ref)"}[cfg.kl])
    if cfg.reward_beta and cfg.reward_kl != "k1":
        found.append(f"{cfg.reward_kl} inside the reward does not have the gradient of KL(p || ref); k1 does")
    if cfg.beta and cfg.dead_groups == "keep":
        found.append("groups without difference still give a KL gradient")
    if cfg.advantage == "gdpo":
        found.append("weights act on normalised advantages, so the scales of the rewards do not matter"
                     + ("; as groups become alike, batch normalisation enlarges those that still differ"
                        if cfg.whiten != "none" else "; without batch normalisation the scale grows with the rewards"))
    if cfg.whiten == "token" and not cfg.by_token:
        found.append("whitening over tokens counts long completions more: a group's advantages need not add up to 0")
    if cfg.ratio == "sequence-sum" and cfg.log_ratio_bound is None:
        found.append("the product of a completion's ratios can overflow; log_ratio_bound bounds it")
    if cfg.correction != "none" and cfg.correction_level == "sequence":
        found.append("a correction by the product of a completion spreads with its length: look at its size by length")
    return found


def _adaptive(value: float, target: float | None) -> str:
    return f"{value:g}" if target is None else f"{value:g} (adaptive)"


def _outer(cfg: ObjectiveConfig) -> str:
    return {"sequence-mean": "1/N_seq Σ_i 1/|o_i| Σ_t", "token-mean": "1/N_tok Σ_i Σ_t",
            "token-mean-local": "Σ_micro-batches n_seq/N_seq 1/n_tok Σ_i Σ_t", "constant": f"1/(N_seq * {cfg.max_tokens}) Σ_i Σ_t",
            "sequence-sum": "1/N_seq Σ_i Σ_t", "token-sum": "Σ_i Σ_t"}[cfg.aggregation]


def _factor(cfg: ObjectiveConfig) -> str:
    return "c * " if cfg.correction != "none" or cfg.off_policy is not None or cfg.high_entropy < 1 else ""


def _policy(cfg: ObjectiveConfig) -> str:
    low, high = f"{1 - cfg.clip_low:g}", f"{1 + cfg.clip_high:g}"
    if cfg.policy == "cispo":
        return f"-sg[{f'min(r, {high})' if cfg.clip_low >= 1 else f'clip(r, {low}, {high})'}] A log p(o_it)"
    if cfg.policy == "sapo":
        return f"-(4/τ) σ(τ (r - 1)) A, τ = {cfg.tau_pos:g} if A > 0 else {cfg.tau_neg:g}"
    if cfg.policy == "gmpo":
        return (f"-A exp(mean_t l), l = log(p / p_old)(o_it), at most {cfg.clip_high:g} where A > 0, at least -{cfg.clip_low:g} "
                "where A < 0")
    if cfg.policy == "reinforce":
        return "-A log p(o_it)"
    free = "r" if cfg.delta is None else f"min(r, {cfg.delta:g})"
    return f"-min({free} A, clip(r, {low}, {high}) A)"


def _entropy(cfg: ObjectiveConfig) -> str:
    if not cfg.entropy_coef and cfg.entropy_target is None:
        return ""
    when = "" if cfg.entropy_target is None else f" while H <= {cfg.entropy_target:g} (adaptive)"
    return f" - {cfg.entropy_coef:g} 1/N_tok Σ_i Σ_t H_it{when}"


def _ratio(cfg: ObjectiveConfig) -> str:
    text = {"token": "p(o_it) / p_old(o_it)", "sequence": "(p(o_i) / p_old(o_i))^(1/|o_i|)",
            "sequence-token": "sg[(p(o_i) / p_old(o_i))^(1/|o_i|)] * p(o_it) / sg[p(o_it)]",
            "sequence-sum": "p(o_i) / p_old(o_i)"}[cfg.ratio]
    return text + (f", |log r| <= {cfg.log_ratio_bound:g}" if cfg.log_ratio_bound else "")


def _advantage(cfg: ObjectiveConfig) -> str:
    if cfg.advantage == "gae":
        text = f"Σ_k ({cfg.gamma:g} * {cfg.lam:g})^k δ_t+k, δ_t = r_t + {cfg.gamma:g} V_t+1 - V_t, over the model's tokens"
    elif cfg.advantage == "returns":
        text = f"Σ_k {cfg.gamma:g}^k r_t+k, over the model's tokens"
    elif cfg.advantage == "gdpo":
        text = (f"Σ_k w_k (R_k - mean_group R_k) / (std_group R_k + {cfg.eps:g}), n - 1 in std; exactly 0 where the group's "
                "R_k are equal")
    else:
        text = _group_advantage(cfg)
    if cfg.whiten == "none":
        return text
    over = {"sequence": f"(A - mean_completions A) / (std_completions A + {cfg.eps:g})",
            "token": "(A - mean_tokens A) / sqrt(var_tokens A + 1e-8)"}[cfg.whiten]
    return f"{text}; then A <- {over} over the batch"


def _group_advantage(cfg: ObjectiveConfig) -> str:
    divided = "" if cfg.scale == "none" else f" / (std_{cfg.scale} R + {cfg.eps:g}), n - 1 in std"
    if cfg.advantage == "pass@k":
        lead = "R_max - R_second"
        return f"{f'({lead})' if divided else lead}{divided} for the best of the group, 0 for the others"
    centred = {"mean": "R_i - mean_group R", "leave-one-out": "R_i - mean_others R",
               "length-weighted": "R_i - Σ_group |o| R / Σ_group |o|"}[cfg.baseline]
    return f"{f'({centred})' if divided else centred}{divided}; exactly 0 where the group's R are equal"


def _reward(cfg: ObjectiveConfig) -> str:
    text = f"weighted sum of the reward components; one that nobody graded {_MISSING_TEXT[cfg.missing]}"
    if cfg.advantage == "gdpo":
        return f"the reward components R_k, weights w_k; one that nobody graded {_MISSING_TEXT[cfg.missing]}"
    if cfg.reward_clip is not None:
        text += f"; clipped to +-{cfg.reward_clip:g}"
    penalty = f" - {_adaptive(cfg.reward_beta, cfg.kl_target)}{'' if cfg.by_token else ' Σ_t'} ({_KL_TEXT[cfg.reward_kl]})" if cfg.reward_beta else ""
    if cfg.by_token:
        text += f"; r_t = [t is the last of the model's tokens] R{penalty}"
    elif penalty:
        text += f"; then R <- R{penalty}"
    return text + (f", d = log p_ref - log p_old ({cfg.reward_kl})" if penalty else "")


def _correction(cfg: ObjectiveConfig) -> str:
    parts = []
    if cfg.correction != "none":
        of = {"token": "w = (p_old / p_sampler)(o_it)", "sequence": "w = (p_old / p_sampler)(o_i)",
              "sequence-mean": "w = (p_old / p_sampler)(o_i)^(1/|o_i|)",
              "sequence-max": "w = (p_old / p_sampler)(the token of o_i that differs most)"}[cfg.correction_level]
        low = "0" if cfg.correction_low is None else f"{cfg.correction_low:g}"
        high = "inf" if cfg.correction_high is None else f"{cfg.correction_high:g}"
        band = {"truncate": f"clip(w, {low}, {high})", "mask": f"w within [{low}, {high}], 0 outside"}[cfg.correction]
        parts.append(f"{band}, {of}")
    if cfg.off_policy is not None:
        parts.append(f"0 where A < 0 and mean_t log(p_sampler / p)(o_it) > {cfg.off_policy:g}")
    if cfg.high_entropy < 1:
        parts.append(f"1 for the {cfg.high_entropy:.0%} of tokens with the highest entropy, 0 for the others")
    return "; times ".join(parts)


def _critic(cfg: ObjectiveConfig) -> str:
    if cfg.value_clip is None:
        return "1/2 (V - return)^2, return = A + V_old before whitening"
    return (f"1/2 max((V - return)^2, (clip(V, V_old - {cfg.value_clip:g}, V_old + {cfg.value_clip:g}) - return)^2), "
            "return = A + V_old before whitening")


_KL_TEXT = {
    "k1": "-d", "abs": "|d|", "k2": "d^2 / 2", "k3": "e^d - d - 1", "k3+": "sg[e^d - d - 1] with the gradient of d^2 / 2",
    "k3-corrected": "r (e^d - d - 1)",
}
_MISSING_TEXT = {"zero": "adds 0", "exclude": "takes the completion out of the baseline, with A = 0",
                 "refuse": "is an error"}
