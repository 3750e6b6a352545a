"""Two real processes compute what one computes: loss, gradient and every metric, of online and preference objectives.

What goes over ranks is what a data-parallel loop sends: rewards are gathered before the advantages, counts are added before
the first backward pass, and shares of losses, gradients and metrics are summed (maxima for keys that end in /max).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pellucid.align import ObjectiveConfig, assign_credit, recipe, token_advantages, value_loss
from pellucid.align.aggregation import Counts
from pellucid.align.metrics import merge
from pellucid.align.objective import objective_padded
from pellucid.align.preference import preference_objective
from pellucid.align.preference_config import PreferenceConfig, preference_recipe

ONLINE = {
    "grpo": ObjectiveConfig(beta=0.1), "gdpo": recipe("gdpo", aggregation="token-mean"), "cispo": recipe("cispo"),
    "dr-grpo": recipe("dr-grpo", max_tokens=9, truncated="keep"), "rf++": recipe("reinforce++-baseline"),
    "gspo": ObjectiveConfig(ratio="sequence", clip_low=0.3, clip_high=0.4),
    "corrected": ObjectiveConfig(correction="mask", correction_level="sequence-mean", entropy_coef=0.1, aggregation="token-mean"),
}
TOKENS = {"ppo": recipe("ppo"), "rf++": recipe("reinforce++", truncated="keep")}
PAIRS = {name: preference_recipe(name) for name in ("dpo", "ipo", "rpo", "simpo", "mpo")}
CUT = (slice(0, 1), slice(1, 3))  # prompts of each rank: one, and two
G, T = 4, 6


def rollout():
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[1, 6, 3, 0], [5, 2, 4, 4], [6, 1, 2, 3]])
    mask = torch.arange(T) < lengths[..., None]
    logp = -2 * torch.rand(3, G, T, generator=g, dtype=torch.float64)
    old, ref, sampler = (logp + s * torch.randn(3, G, T, generator=g, dtype=torch.float64) for s in (0.3, 0.5, 0.4))
    rewards = {"a": torch.randint(0, 2, (3, G), generator=g).double(), "b": torch.rand(3, G, generator=g, dtype=torch.float64)}
    return logp, old, ref, sampler, mask, lengths, rewards


def online(name, part, gathered, total):
    """This rank's share; `gathered` brings the rewards and lengths of all ranks, `total` adds counts over ranks."""
    cfg = ONLINE[name]
    logp, old, ref, sampler, mask, lengths, rewards = rollout()
    mine = slice(*part.indices(3))
    everyone = {k: gathered(v[mine]) for k, v in rewards.items()}
    credit = assign_credit(everyone, gathered(lengths[mine]), cfg)
    own = assign_credit({k: v[mine] for k, v in rewards.items()}, lengths[mine], ObjectiveConfig(empty=cfg.empty))
    counts = total(own.counts)
    assert counts == credit.counts
    x = logp[mine].flatten(0, 1).requires_grad_()
    rows = [y[mine].flatten(0, 1) for y in (old, ref, sampler, mask)]
    loss, metrics = objective_padded(x, rows[0], rows[1] if cfg.beta else None, credit.advantages[mine].flatten(), rows[3], cfg,
                                     counts, sampler=rows[2], entropy=x.square())
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad.view(-1, G, T), {k: float(v) for k, v in metrics.items()}


def preference(name, part, gathered, total):
    """Completions 2p and 2p + 1 of each prompt are a pair; an empty one gets a token."""
    logp, _, ref, _, mask, lengths, _ = rollout()
    mask = torch.arange(T) < lengths.clamp(min=1)[..., None]
    mine = slice(*part.indices(3))
    x = logp[mine].flatten(0, 1).requires_grad_()
    on, n = mask[mine].flatten(0, 1), x.shape[0]
    counts = total(Counts(tokens=int(on[0::2].sum()), sequences=n // 2))
    row = torch.arange(n)[:, None].expand(n, T)
    cfg: PreferenceConfig = PAIRS[name]
    loss, metrics = preference_objective(x[on], ref[mine].flatten(0, 1)[on], row[on], cfg, counts)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad.view(-1, G, T), {k: float(v) for k, v in metrics.items()}


def by_token(name, part, gathered, total):
    """PPO and REINFORCE++: the whitening of advantages is over the tokens of all ranks, and so is the critic's mean."""
    cfg = TOKENS[name]
    logp, old, ref, sampler, mask, lengths, rewards = rollout()
    critic, mine = sampler.flip(0), slice(*part.indices(3))
    credit = assign_credit({k: gathered(v[mine]) for k, v in rewards.items()}, gathered(lengths[mine]), cfg)
    counts = total(assign_credit({k: v[mine] for k, v in rewards.items()}, lengths[mine], cfg).counts)
    assert counts == credit.counts
    on, p, r, v = (gathered(y[mine]).flatten(0, 1) for y in (mask, old, ref, critic))
    row = torch.arange(3 * G)[:, None].expand(on.shape)
    values, targets = token_advantages(credit.advantages.flatten(), row[on], cfg, old=p[on], ref=r[on], critic=v[on])
    own = slice(mine.start * G, mine.stop * G)
    advantages, returns = (torch.zeros(on.shape).masked_scatter(on, y if y is not None else values)[own] for y in (values, targets))
    x, here = logp[mine].flatten(0, 1).requires_grad_(), on[own]
    loss, metrics = objective_padded(x, p[own], None, advantages, here, cfg, counts)
    judged = value_loss(x + v[own], returns, v[own], cfg.value_clip)[here].sum() / counts.tokens
    (grad,) = torch.autograd.grad(loss + cfg.value_coef * judged, x)
    return (loss + cfg.value_coef * judged).detach(), grad.view(-1, G, T), {k: float(v) for k, v in metrics.items()}


CASES = [(by_token, name) for name in TOKENS] + [(online, name) for name in ONLINE] + [(preference, name) for name in PAIRS]


def worker(rank, port, file):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def gathered(x):
        parts = [None, None]
        dist.all_gather_object(parts, x)
        return torch.cat(parts)

    def total(counts):
        both = torch.tensor([counts.tokens, counts.sequences])
        dist.all_reduce(both)
        return Counts(*both.tolist())

    found = {}
    for call, name in CASES:
        loss, grad, metrics = call(name, CUT[rank], gathered, total)
        dist.all_reduce(loss)
        everyone = [None, None]
        dist.all_gather_object(everyone, metrics)
        found[f"{call.__name__}/{name}/loss"], found[f"{call.__name__}/{name}/grad"] = loss[None], gathered(grad)
        merged = merge(everyone)
        found[f"{call.__name__}/{name}/metrics"] = torch.tensor([merged[k] for k in sorted(merged)], dtype=torch.float64)
    if rank == 0:
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in found.items()}, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    from safetensors.torch import load_file

    file = tmp_path_factory.mktemp("ranks") / "found.safetensors"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(port), str(file)], stderr=subprocess.PIPE,
                              cwd=Path(__file__).parent, env=os.environ) for rank in (0, 1)]
    for process in ranks:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint.decode()
    return load_file(file)


@pytest.mark.parametrize("call, name", CASES)
def test_two_processes_equal_one(two_processes, call, name):
    loss, grad, metrics = call(name, slice(0, 3), lambda x: x, lambda c: c)
    key = f"{call.__name__}/{name}"
    torch.testing.assert_close(two_processes[f"{key}/loss"][0], loss, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(two_processes[f"{key}/grad"], grad, atol=1e-9, rtol=1e-7)
    assert two_processes[f"{key}/metrics"].tolist() == pytest.approx([metrics[k] for k in sorted(metrics)], abs=1e-9)
    assert float(grad.abs().max()) > 1e-3


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
