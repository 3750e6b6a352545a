"""Every choice of a preference objective (the DPO family) that changes a number, its presets, and its formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pellucid.align.choices import changed, check_choices, check_name, check_unused
from pellucid.errors import BadInput, nearest

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

# name -> the loss of one pair. c, r: log p / p_ref of chosen and rejected (sums); Lc, Lr their tokens; b = beta;
# e = smoothing; f = f_divergence; lp: log p of the policy alone, a bar the mean over tokens.
FORMULAS: dict[str, str] = {
    "sigmoid": "-log σ(b (f(c) - f(r)))",
    "cdpo": "-(1 - e) log σ(b (f(c) - f(r))) - e log σ(-b (f(c) - f(r)))",
    "robust": "(-(1 - e) log σ(b (f(c) - f(r))) + e log σ(-b (f(c) - f(r)))) / (1 - 2 e)",
    "ipo": "(f(c)/Lc - f(r)/Lr - 1/(2 b))^2",
    "ipo_sum": "(f(c) - f(r) - 1/(2 b))^2",
    "hinge": "max(0, 1 - b (f(c) - f(r)))",
    "sigmoid_norm": "-log σ(b (f(c)/Lc - f(r)/Lr))",
    "exo_pair": "q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e), q = σ(b (f(c) - f(r)))",
    "nca_pair": "-log σ(b c) - 1/2 log σ(-b c) - 1/2 log σ(-b r)",
    "bco_pair": "-log σ(b c) - log σ(-b r)",
    "sppo_hard": "(c - 1/(2 b))^2 + (r + 1/(2 b))^2",
    "apo_zero": "1 - σ(b c) + σ(b r)",
    "apo_down": "σ(b c) + 1 - σ(b (c - r))",
    "aot": "-(1 - e) log σ(b d) - e log σ(-b d), d = sorted(lp_c - lp_r) - sorted(ref_c - ref_r) over the batch",
    "aot_unpaired": "-(1 - e) log σ(b d) - e log σ(-b d), d = sorted(c) - sorted(r) over the batch",
    "discopop": "(1 - s) (-log σ(x)) + s exp(-x), x = b (f(c) - f(r)), s = σ(x/τ)",
    "simpo": "-(1 - e) log σ(b (lp̄_c - lp̄_r) - γ) - e log σ(-(b (lp̄_c - lp̄_r) - γ))",
    "cpo": "-(1 - e) log σ(b (lp_c - lp_r)) - e log σ(-b (lp_c - lp_r))",
    "orpo": "-b log σ(log odds(lp̄_c) - log odds(lp̄_r)), log odds(x) = x - log(1 - e^x)",
    "sft": "-lp_c, a mean over the chosen tokens of the batch",
}
REFERENCE_FREE = ("simpo", "cpo", "orpo", "sft")
SMOOTHED = ("cdpo", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo")
DIVERGENT = ("sigmoid", "cdpo", "robust", "ipo", "ipo_sum", "hinge", "sigmoid_norm", "exo_pair", "discopop")
SORTED = ("aot", "aot_unpaired")


@dataclass(frozen=True)
class PreferenceConfig:
    """Every choice of a preference objective that changes a number. Impossible or unused ones raise BadInput."""

    losses: dict[str, float] = field(default_factory=lambda: {"sigmoid": 1.0})
    """the losses of a pair and their weights; several make a mixture (MPO)"""
    beta: float = 0.1
    """how strongly the policy is held to the reference"""
    smoothing: float = 0.0
    """share of pairs whose label is believed to be wrong"""
    f_divergence: Divergence = "reverse_kl"
    """what holds the policy to the reference: f' of the ratio stands in for the log ratio"""
    alpha: float = 0.5
    """alpha of the alpha-divergence; 1 is reverse_kl"""
    gamma: float = 0.5
    """target margin of simpo"""
    tau: float = 0.05
    """temperature of discopop's blend"""
    weighting: Literal["none", "wpo"] = "none"
    """weigh pairs by how likely the policy finds them (WPO)"""
    ld_alpha: float | None = None
    """weight of the tokens beyond the shorter answer's length (LD-DPO); none: all count alike"""

    def __post_init__(self) -> None:
        check_choices(self, "preference objective")
        if not self.losses:
            raise BadInput("a preference objective needs at least one loss", next="give losses={'sigmoid': 1.0}")
        for name in self.losses:
            check_name("preference loss", name, list(FORMULAS))
        _check_numbers(self)
        check_unused(self, "preference objective", _needs(self))

    @property
    def needs_reference(self) -> bool:
        return any(name not in REFERENCE_FREE for name in self.losses)

    @property
    def whole_batch(self) -> bool:
        """Whether a pair's loss depends on the other pairs, so that micro-batches change it."""
        return any(name in SORTED for name in self.losses)


def _check_numbers(cfg: PreferenceConfig) -> None:
    wrong = ""
    if not cfg.beta > 0 or not cfg.tau > 0:
        wrong = "beta and tau are positive"
    elif not 0 <= cfg.smoothing < 0.5:
        wrong = "smoothing lies in [0, 0.5): at one half the labels say nothing"
    elif "exo_pair" in cfg.losses and cfg.smoothing == 0:
        wrong = "exo_pair needs a smoothing above 0: without it the loss is infinite"
    elif "sigmoid" in cfg.losses and cfg.smoothing:
        wrong = "smoothing has no effect on 'sigmoid'; use 'cdpo' or 'robust'"
    elif cfg.ld_alpha is not None and not 0 <= cfg.ld_alpha <= 1:
        wrong = "ld_alpha lies in [0, 1]"
    elif cfg.weighting == "wpo" and cfg.whole_batch:
        wrong = "sorted pairs (aot) have no weight of their own: no wpo with them"
    if wrong:
        raise BadInput(f"preference objective: {wrong}", next="change the value named above")


def _needs(cfg: PreferenceConfig) -> dict[str, tuple[bool, str]]:
    names = set(cfg.losses)
    return {
        "smoothing": (bool(names & set(SMOOTHED)), f"a loss among {', '.join(SMOOTHED)}"),
        "f_divergence": (bool(names & set(DIVERGENT)), f"a loss among {', '.join(DIVERGENT)}"),
        "alpha": (cfg.f_divergence == "alpha", "f_divergence='alpha'"),
        "gamma": ("simpo" in names, "the loss 'simpo'"), "tau": ("discopop" in names, "the loss 'discopop'"),
        "beta": (names != {"sft"}, "a loss other than 'sft'"),
        "weighting": (names != {"sft"}, "a loss other than 'sft'"), "ld_alpha": (names != {"sft"}, "a loss other than 'sft'"),
    }


PREFERENCE_RECIPES: dict[str, dict[str, Any]] = {
    "dpo": dict(),  # arXiv 2305.18290
    "cdpo": dict(losses={"cdpo": 1.0}, smoothing=0.1),  # Mitchell 2023, "A note on DPO with noisy preferences"
    "robust": dict(losses={"robust": 1.0}, smoothing=0.1),  # arXiv 2403.00409
    "ipo": dict(losses={"ipo": 1.0}),  # arXiv 2310.12036 with mean log ratios, as its authors confirmed to trl
    "ipo-sum": dict(losses={"ipo_sum": 1.0}),  # the same as it is printed, with sums (OpenRLHF)
    "hinge": dict(losses={"hinge": 1.0}),  # arXiv 2305.10425 (SLiC), in DPO's form 2309.06657
    "dpo-norm": dict(losses={"sigmoid_norm": 1.0}, beta=5.0),  # arXiv 2411.15124 (Tülu 3)
    "exo": dict(losses={"exo_pair": 1.0}, smoothing=1e-3),  # arXiv 2402.00856
    "nca": dict(losses={"nca_pair": 1.0}, beta=0.01),  # arXiv 2402.05369
    "bco": dict(losses={"bco_pair": 1.0}),  # arXiv 2404.04656
    "sppo": dict(losses={"sppo_hard": 1.0}, beta=1e-3),  # arXiv 2405.00675
    "apo-zero": dict(losses={"apo_zero": 1.0}),  # arXiv 2408.06266
    "apo-down": dict(losses={"apo_down": 1.0}),
    "aot": dict(losses={"aot": 1.0}),  # arXiv 2406.05882
    "aot-unpaired": dict(losses={"aot_unpaired": 1.0}),
    "discopop": dict(losses={"discopop": 1.0}, beta=0.05),  # arXiv 2406.08414
    "rpo": dict(losses={"sigmoid": 1.0, "sft": 1.0}),  # arXiv 2404.19733
    "mpo": dict(losses={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}),  # arXiv 2411.10442
    "wpo": dict(weighting="wpo"),  # arXiv 2406.11827
    "ld-dpo": dict(ld_alpha=0.5),  # arXiv 2409.06411
    "simpo": dict(losses={"simpo": 1.0}, beta=2.0, gamma=1.0),  # arXiv 2405.14734
    "cpo": dict(losses={"cpo": 1.0, "sft": 1.0}),  # arXiv 2401.08417
    "orpo": dict(losses={"orpo": 1.0, "sft": 1.0}),  # arXiv 2403.07691
}


def recipe_of_losses(losses: Mapping[str, float]) -> str:
    """The recipe whose numbers these losses were published with: that of the one loss of pairs there is, with or without its sft;
    of several, or where it has no recipe of its own: "dpo"."""
    pairs = [name for name in losses if name != "sft"]
    return next((recipe for recipe, choices in PREFERENCE_RECIPES.items()
                 if [name for name in choices.get("losses", ("sigmoid",)) if name != "sft"] == pairs), "dpo")


def preference_recipe(name: str, **changes: Any) -> PreferenceConfig:
    """The named preference objective, with fields changed. Errors: BadInput for unknown names and idle choices."""
    if name not in PREFERENCE_RECIPES:
        raise BadInput(f"no preference objective is called {name!r}{nearest(name, list(PREFERENCE_RECIPES))}",
                       next=f"use one of {', '.join(PREFERENCE_RECIPES)}")
    cfg = changed(PreferenceConfig, PREFERENCE_RECIPES[name], changes, "the preference objective")
    assert isinstance(cfg, PreferenceConfig)
    return cfg


def preference_formula(cfg: PreferenceConfig) -> str:
    """The resolved objective in plain text.

    >>> print(preference_formula(PreferenceConfig()))
    minimise  mean over pairs of  -log σ(b (f(c) - f(r)))
    b = 0.1; c, r = log p / p_ref of the chosen and the rejected completion, summed over their tokens; f(x) = x
    note: log p of the chosen completions can fall while the loss does: only the margin is optimised
    """
    several = [f"{'' if w == 1 else f'{w:g} * '}[{FORMULAS[name]}]" for name, w in cfg.losses.items()]
    only = next(iter(cfg.losses))
    text = FORMULAS[only] if len(several) == 1 and cfg.losses[only] == 1 else " + ".join(several)
    w = "w_c w_r * " if cfg.weighting == "wpo" and set(cfg.losses) != {"sft"} else ""
    lines = [f"minimise  mean over pairs of  {w}{f'({text})' if w and len(several) > 1 else text}", _where(cfg)]
    if w:
        lines.append("w = sg[exp(mean_t (log p_t - log Σ_v p_v^2))]" + (", not for sft" if "sft" in cfg.losses else ""))
    if cfg.ld_alpha is not None:
        lines.append(f"tokens beyond the shorter completion's length count {cfg.ld_alpha:g} times (LD-DPO)")
    return "\n".join(lines + [f"note: {note}" for note in preference_notes(cfg)])


def preference_notes(cfg: PreferenceConfig) -> list[str]:
    """Known traps of this combination of choices."""
    found = []
    if "sft" not in cfg.losses:
        found.append("log p of the chosen completions can fall while the loss does: only the margin is optimised")
    if cfg.whole_batch:
        found.append("aot sorts the pairs of a batch: micro-batches would change it, and are refused")
    if {"ipo", "ipo_sum"} & set(cfg.losses):
        found.append("IPO's target 1/(2 b) is for mean log ratios in 'ipo' and for sums in 'ipo_sum': their betas differ")
    return found


def _where(cfg: PreferenceConfig) -> str:
    names, parts = set(cfg.losses), [f"b = {cfg.beta:g}"]
    if names & set(SMOOTHED):
        parts.append(f"e = {cfg.smoothing:g}")
    if cfg.needs_reference:
        parts.append("c, r = log p / p_ref of the chosen and the rejected completion, summed over their tokens")
    if names & set(REFERENCE_FREE):
        parts.append("lp = log p summed over the tokens, lp̄ its mean")
    if names & set(DIVERGENT):
        parts.append({"reverse_kl": "f(x) = x", "forward_kl": "f(x) = 1 - e^-x", "js": "f(x) = log 2 + log σ(x)",
                      "alpha": f"f(x) = (e^({cfg.alpha - 1:g} x) - 1) / {cfg.alpha - 1:g}"}[cfg.f_divergence])
    if "simpo" in names:
        parts.append(f"γ = {cfg.gamma:g}")
    if "discopop" in names:
        parts.append(f"τ = {cfg.tau:g}")
    return "; ".join(parts)
