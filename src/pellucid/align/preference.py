"""Losses on pairs of a chosen and a rejected completion: DPO (arXiv 2305.18290) and its relatives.

Shapes: P pairs. c, r = log p / p_ref of the chosen and the rejected completion (summed over its tokens), b = beta,
e = label smoothing. Each loss is a function of `Terms` and `PreferenceConfig`, (P,); `FORMULAS` there prints it.

Tokens come flat, (M,) end to end, as in `objective`: sequence 2p is the chosen, 2p + 1 the rejected completion of
pair p, both whole in this call. Losses are shares of the step's: `counts` holds the pairs (sequences) and the CHOSEN
tokens of the whole step, so micro-batches and ranks add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.align.aggregation import Counts, sequence_lengths, sequence_means, sequence_sums
from pellucid.align.preference_config import PreferenceConfig
from pellucid.align.returns import Layout
from pellucid.errors import BadInput

LARGEST = 80.0  # exponent


@dataclass(frozen=True)
class Terms:
    """What the losses of P pairs are made of, (P,) each. `fc`, `fr`: c and r after the f-divergence."""

    c: Tensor
    r: Tensor
    fc: Tensor
    fr: Tensor
    chosen: Tensor  # log p of the chosen completion under the policy
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


def preference_objective(
    logp: Tensor, ref: Tensor | None, sequence: Tensor, cfg: PreferenceConfig, counts: Counts, *,
    log_square: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's loss (scalar, differentiable in `logp`), and its shares of the metrics.

    logp, ref: (M,) log-probabilities of the completions' tokens under policy and reference (None if no loss needs it).
    log_square: (M,) log sum_v p_v^2 of every token's distribution, needed by weighting="wpo".
    """
    pairs = _pairs_of(sequence)
    if cfg.needs_reference and ref is None:
        raise BadInput("these preference losses need the reference policy's log-probabilities", next="pass ref")
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    t = terms(logp, None if ref is None else ref.detach().to(logp.dtype), sequence, cfg)
    each = torch.zeros_like(t.c)
    for name, weight in cfg.losses.items():
        if name != "sft":
            each = each + weight * LOSSES[name](t, cfg)
    if cfg.weighting == "wpo":
        each = each * wpo_weights(logp, log_square, sequence)
    loss = each.sum() / max(counts.sequences, 1)
    if "sft" in cfg.losses:  # unweighted, on all chosen tokens, whatever LD-DPO makes of them
        loss = loss - cfg.losses["sft"] * sequence_sums(logp, sequence)[0::2].sum() / max(counts.tokens, 1)
    return loss, _shares(t, logp.detach(), sequence, pairs, cfg, counts)


def terms(logp: Tensor, ref: Tensor | None, sequence: Tensor, cfg: PreferenceConfig) -> Terms:
    """Log-probabilities of tokens -> what the losses are made of."""
    sums = sequence_sums if cfg.ld_alpha is None else _ld_sums(cfg.ld_alpha)
    policy, lengths = sums(logp, sequence), sequence_lengths(sequence).to(logp.dtype)
    ratios = policy - (torch.zeros_like(policy) if ref is None else sums(ref, sequence))
    f = f_scores(ratios, cfg)
    return Terms(ratios[0::2], ratios[1::2], f[0::2], f[1::2], policy[0::2], policy[1::2], lengths[0::2], lengths[1::2])


def f_scores(log_ratio: Tensor, cfg: PreferenceConfig) -> Tensor:
    """f'(p / p_ref) of the divergence that holds the policy to the reference (f-DPO, arXiv 2309.16240, table 1).

        reverse_kl: x;   forward_kl: 1 - e^-x;   js: log 2 + log σ(x);   alpha: (e^((α - 1) x) - 1) / (α - 1)

    An exponent ends at 80 (e^80 is the last that float32 and bfloat16 hold with room), as trl's does for alpha; forward_kl is
    alpha at α = 0. The log ratio of an unlikely long answer gets there, and inf - inf between two of them would be NaN.
    """
    if cfg.f_divergence == "forward_kl":
        return -torch.expm1((-log_ratio).clamp(max=LARGEST))
    if cfg.f_divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    if cfg.f_divergence == "alpha" and abs(cfg.alpha - 1) >= 1e-6:
        return torch.expm1(((cfg.alpha - 1) * log_ratio).clamp(max=LARGEST)) / (cfg.alpha - 1)
    return log_ratio


# --- the losses of a pair ---------------------------------------------------------------------------------------------


def sigmoid(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """-log σ(b (c - r)): DPO (arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(cfg.beta * (t.fc - t.fr))


def smoothed_sigmoid(x: Tensor, e: float) -> Tensor:
    """-(1 - e) log σ(x) - e log σ(-x)."""
    return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)


def cdpo(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """Conservative DPO (Mitchell 2023): labels are wrong with probability e; has a finite minimum."""
    return smoothed_sigmoid(cfg.beta * (t.fc - t.fr), cfg.smoothing)


def robust(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """(-(1 - e) log σ(x) + e log σ(-x)) / (1 - 2 e): unbiased under flipped labels (arXiv 2403.00409, eq. 12)."""
    x, e = cfg.beta * (t.fc - t.fr), cfg.smoothing
    return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)


def ipo(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """(c/Lc - r/Lr - 1/(2 b))^2: IPO (arXiv 2310.12036, eq. 17) on means, as trl does; its authors confirmed it."""
    return (t.fc / t.chosen_tokens.clamp(min=1) - t.fr / t.rejected_tokens.clamp(min=1) - 1 / (2 * cfg.beta)).square()


def ipo_sum(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """(c - r - 1/(2 b))^2: IPO as printed, on sums (OpenRLHF)."""
    return (t.fc - t.fr - 1 / (2 * cfg.beta)).square()


def hinge(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """max(0, 1 - b (c - r)): SLiC (arXiv 2305.10425) in DPO's form (RSO, arXiv 2309.06657)."""
    return F.relu(1 - cfg.beta * (t.fc - t.fr))


def sigmoid_norm(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """-log σ(b (c/Lc - r/Lr)): length-normalised DPO (Tülu 3, arXiv 2411.15124)."""
    return -F.logsigmoid(cfg.beta * (t.fc / t.chosen_tokens.clamp(min=1) - t.fr / t.rejected_tokens.clamp(min=1)))


def exo_pair(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """KL((q, 1 - q) || (1 - e, e)), q = σ(b (c - r)): reverse KL in place of DPO's forward (arXiv 2402.00856, eq. 16)."""
    x, e = cfg.beta * (t.fc - t.fr), cfg.smoothing
    return x.sigmoid() * (F.logsigmoid(x) - math.log1p(-e)) + (-x).sigmoid() * (F.logsigmoid(-x) - math.log(e))


def nca_pair(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """-log σ(b c) - 1/2 log σ(-b c) - 1/2 log σ(-b r): keeps the chosen likely (arXiv 2402.05369)."""
    c, r = cfg.beta * t.c, cfg.beta * t.r
    return -F.logsigmoid(c) - F.logsigmoid(-c) / 2 - F.logsigmoid(-r) / 2


def bco_pair(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """-log σ(b c) - log σ(-b r): a classifier of good and bad (BCO, arXiv 2404.04656, without its reward shift)."""
    return -F.logsigmoid(cfg.beta * t.c) - F.logsigmoid(-cfg.beta * t.r)


def sppo_hard(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """(c - 1/(2 b))^2 + (r + 1/(2 b))^2: self-play preference optimisation with hard labels (arXiv 2405.00675)."""
    return (t.c - 0.5 / cfg.beta).square() + (t.r + 0.5 / cfg.beta).square()


def apo_zero(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """1 - σ(b c) + σ(b r): chosen up, rejected down; chosen better than the policy (arXiv 2408.06266, eq. 7)."""
    return 1 - (cfg.beta * t.c).sigmoid() + (cfg.beta * t.r).sigmoid()


def apo_down(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """σ(b c) + 1 - σ(b (c - r)): both down, rejected further; chosen worse than the policy (eq. 8)."""
    return (cfg.beta * t.c).sigmoid() + 1 - (cfg.beta * (t.c - t.r)).sigmoid()


def aot(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """Alignment via optimal transport (arXiv 2406.05882): the sorted log p_c / p_r of the policy against the sorted of
    the reference: a distribution dominates another, not pair by pair. Depends on which pairs stand in the batch."""
    ratio, ref = t.chosen - t.rejected, (t.chosen - t.c) - (t.rejected - t.r)
    return smoothed_sigmoid(cfg.beta * (ratio.sort().values - ref.sort().values), cfg.smoothing)


def aot_unpaired(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """The same between the sorted c and the sorted r of the batch."""
    return smoothed_sigmoid(cfg.beta * (t.c.sort().values - t.r.sort().values), cfg.smoothing)


def discopop(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """(1 - s) (-log σ(x)) + s e^-x, x = b (c - r), s = σ(x/τ): found by a language model (arXiv 2406.08414, eq. 5).

    s e^-x is taken as one exponential: where x is far below 0, s is 0 and e^-x overflows.
    """
    x = cfg.beta * (t.fc - t.fr)
    return (-x / cfg.tau).sigmoid() * -F.logsigmoid(x) + (F.logsigmoid(x / cfg.tau) - x).clamp(max=LARGEST).exp()


def simpo(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """-log σ(b (mean log p_c - mean log p_r) - γ): no reference, length-normalised (arXiv 2405.14734, eq. 6)."""
    x = t.chosen / t.chosen_tokens.clamp(min=1) - t.rejected / t.rejected_tokens.clamp(min=1)
    return smoothed_sigmoid(cfg.beta * x - cfg.gamma, cfg.smoothing)


def cpo(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """-log σ(b (log p_c - log p_r)): DPO with a uniform reference (arXiv 2401.08417, eq. 3); its nll term is "sft"."""
    return smoothed_sigmoid(cfg.beta * (t.chosen - t.rejected), cfg.smoothing)


def orpo(t: Terms, cfg: PreferenceConfig) -> Tensor:
    """-b log σ(log odds_c - log odds_r) of mean log-probabilities (arXiv 2403.07691, eq. 7); its nll term is "sft".

    log odds(x) = x - log(1 - e^x). The nll here is over the chosen completion; trl's also covers the prompt.
    """
    c, r = t.chosen / t.chosen_tokens.clamp(min=1), t.rejected / t.rejected_tokens.clamp(min=1)
    return -cfg.beta * F.logsigmoid((c - log1mexp(c)) - (r - log1mexp(r)))


LOSSES: dict[str, Callable[[Terms, PreferenceConfig], Tensor]] = {
    f.__name__: f for f in (sigmoid, cdpo, robust, ipo, ipo_sum, hinge, sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard,
                            apo_zero, apo_down, aot, aot_unpaired, discopop, simpo, cpo, orpo)}


# --- parts ------------------------------------------------------------------------------------------------------------


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact near 0 and far from it (Mächler 2012)."""
    near = x > -math.log(2)
    return torch.where(near, (-torch.expm1(torch.where(near, x, -1.0))).log(), torch.log1p(-torch.where(near, -1.0, x).exp()))


def wpo_weights(logp: Tensor, log_square: Tensor | None, sequence: Tensor) -> Tensor:
    """w_c w_r, w = sg[exp(mean_t (log p_t - log sum_v p_v^2))]: pairs that the policy would write count more, (P,)
    (WPO, arXiv 2406.11827, eq. 2 with the sampled alignment)."""
    if log_square is None:
        raise BadInput("weighting='wpo' needs log sum_v p_v^2 of every token", next="pass log_square")
    w = sequence_means((logp - log_square).detach(), sequence).exp()
    return w[0::2] * w[1::2]


def _ld_sums(alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    def sums(values: Tensor, sequence: Tensor) -> Tensor:
        """(M,) -> (2 P,): tokens beyond the shorter completion of their pair count alpha times."""
        lengths = sequence_lengths(sequence)
        shorter = torch.minimum(lengths[0::2], lengths[1::2]).repeat_interleave(2)
        shared = Layout(sequence).column < shorter[sequence]
        return sequence_sums(torch.where(shared, values, alpha * values), sequence)

    return sums


def _pairs_of(sequence: Tensor) -> int:
    lengths = sequence_lengths(sequence)
    if lengths.numel() % 2 or bool((lengths == 0).any()):
        raise BadInput("pairs are sequences 2p (chosen) and 2p + 1 (rejected), each with at least one token",
                       f"{lengths.numel()} sequences, {int((lengths == 0).sum())} of them empty",
                       "leave out pairs with an empty completion")
    return lengths.numel() // 2


def _shares(
    t: Terms, logp: Tensor, sequence: Tensor, pairs: int, cfg: PreferenceConfig, counts: Counts
) -> dict[str, Tensor]:
    """Sums over these pairs / pairs of the step. Rewards are b times the log ratio; a tie counts as wrong, as in trl."""
    c, r, sums = cfg.beta * t.c.detach(), cfg.beta * t.r.detach(), sequence_sums(logp, sequence)
    values = {"rewards/chosen": c, "rewards/rejected": r, "rewards/margin": c - r, "rewards/accuracy": (c > r).to(c.dtype),
              "logps/chosen": sums[0::2], "logps/rejected": sums[1::2]}
    return {name: v.sum() / max(counts.sequences, 1) for name, v in values.items()}
