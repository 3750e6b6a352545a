"""The gated delta rule (gated delta networks, arXiv 2412.06464, equation 10): linear attention whose memory decays, and is
corrected instead of added to. For each token, with a memory S that maps keys to values:

    S <- e^g S              what is remembered fades
    S <- S + k (beta (v - S^T k))^T   what it says of k moves towards v, by the share beta
    y = S^T q

Shapes: B batch, K key heads, H value heads (each key head serves H / K consecutive ones), T tokens, d and e the widths of a
key and of a value.
    q, k (B, K, T, d)   v (B, H, T, e)   g, beta (B, H, T)   S (B, H, d, e)   ->   y (B, H, T, e), and S after the last token
    documents (B, T): ids of packed documents; the memory is emptied where one begins.
Memory and arithmetic are in float32 at least, whatever q, k, v are. Keys should have length 1 (`l2_norm`): longer ones may make
the memory grow without bound.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension, in float32 at least; eps stands inside the root."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def gated_delta_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token, as the formula says. `state`: the memory before the first token, None for an empty one."""
    groups = v.shape[1] // k.shape[1]
    q, k = (x.repeat_interleave(groups, 1) for x in (q, k))
    wide = torch.promote_types(v.dtype, torch.float32)
    dtype, (q, k, v, g, beta) = v.dtype, (x.to(wide) for x in (q, k, v, g, beta))
    S = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state
    number, out = None if documents is None else runs(documents), []
    for t in range(v.shape[2]):
        if number is not None and t > 0:
            S = S.masked_fill((number[:, t] != number[:, t - 1])[:, None, None, None], 0)
        S = S * g[:, :, t, None, None].exp()
        key = k[:, :, t, :, None]
        S = S + key * (beta[:, :, t, None, None] * (v[:, :, t, None] - key.mT @ S))
        out.append(q[:, :, t, None] @ S)
    return torch.cat(out, 2).to(dtype), S


def gated_delta_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, documents: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same by chunks of C tokens, in products of matrices (the UT transform, arXiv 2406.06484 section 3.2).

    Within a chunk let G_i = g_1 + ... + g_i and D_ij = e^(G_i - G_j) for j <= i (summed from j to i: where much has faded, G_i and
    G_j are large, and their difference would be rounded). What token i writes, u_i = beta_i (v_i - S^T k_i),
    depends on what the tokens before it wrote, which for the whole chunk is one triangular system:
        (1 + strict(beta_i D_ij k_i . k_j)) u = beta v - (beta e^G k) S0
    S0, the memory before the chunk, is not known when all chunks are solved at once: both right sides are solved for.
        y = (e^G q) S0 + (D_ij q_i . k_j) u          S1 = e^(G_C) S0 + (e^(G_C - G) k)^T u
    """
    (B, K, T, d), (H, e), dtype = k.shape, (v.shape[1], v.shape[3]), v.dtype
    C = min(chunk, T)
    N = -(-T // C)
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v, g, beta = (_chunks(x.to(wide), N, C, K) for x in (q, k, v, g, beta))  # (B, K, 1 or H / K, N, C, ...)
    future = torch.ones(C, C, dtype=torch.bool, device=v.device).triu(1)
    D = g[..., None].expand(*g.shape, C).tril(-1).cumsum(-2).masked_fill(future, -torch.inf).exp()
    in_decay, out_decay = g.cumsum(-1).exp(), D[..., -1, :]  # from before the chunk to each token, from each token to its end
    if documents is not None:
        same, entered, stays = _within_documents(documents, N, C)
        D, in_decay, out_decay = D * same, in_decay * entered, out_decay * stays
    weighted = beta[..., None]
    right = torch.cat((v, (k * in_decay[..., None])), -1) * weighted
    u, w = torch.linalg.solve_triangular((k @ k.mT) * D * weighted, right, upper=False, unitriangular=True).split((e, d), -1)
    pairs, q, k = (q @ k.mT) * D, q * in_decay[..., None], k * out_decay[..., None]
    S = v.new_zeros(B, K, H // K, d, e) if state is None else state.to(wide).unflatten(1, (K, -1))
    out = []
    for n in range(N):
        written = u[..., n, :, :] - w[..., n, :, :] @ S
        out.append(q[..., n, :, :] @ S + pairs[..., n, :, :] @ written)
        S = S * in_decay[..., n, -1:, None] + k[..., n, :, :].mT @ written
    y = torch.cat(out, -2)[..., :T, :]
    return y.flatten(1, 2).to(dtype), S.flatten(1, 2)


def _chunks(x: Tensor, N: int, C: int, K: int) -> Tensor:
    """(B, K or H, T, ...) -> (B, K, 1 or H / K, N, C, ...): tokens beyond the last are zeros, which change nothing."""
    x = F.pad(x, (0, 0, 0, N * C - x.shape[2]) if x.dim() == 4 else (0, N * C - x.shape[2]))
    return x.unflatten(2, (N, C)).unflatten(1, (K, -1))


def runs(documents: Tensor) -> Tensor:
    """documents (B, T) -> for each token the number of the document that it stands in, counted from 0 along the row."""
    return F.pad((documents.diff(dim=1) != 0).cumsum(1), (1, 0))


def _within_documents(documents: Tensor, N: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """For (B, T) documents, broadcastable to heads: whether tokens i and j of a chunk (.., N, C, C), a token and the one before its
    chunk (.., N, C), a token and the last of its chunk (.., N, C) are of one document."""
    number = F.pad(runs(documents).float(), (0, N * C - documents.shape[1]), mode="replicate").unflatten(1, (N, C))[:, None, None]
    before = torch.cat((number[..., :1, :1], number[..., :-1, -1:]), -2)
    return number[..., :, None] == number[..., None, :], number == before, number == number[..., -1:]


def choose_gated_delta(T: int) -> tuple[str, str]:
    """('reference' | 'chunked', why)"""
    if T == 1:
        return "reference", "one new token: the formula itself is four small products"
    return "chunked", f"{T} tokens: products over chunks of {CHUNK}"


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The fast form for so many tokens; `gated_delta_reference` is what it must equal."""
    choice, _ = choose_gated_delta(v.shape[2])
    form = gated_delta_reference if choice == "reference" else gated_delta_chunked
    return form(q, k, v, g, beta, state, documents)


def causal_conv(
    x: Tensor, weight: Tensor, before: Tensor | None = None, documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (B, T, C), weight (C, W) -> y_t = sum over w of weight_w x_(t - W + 1 + w), every channel by itself, and the last W - 1
    inputs (B, W - 1, C), which a later call takes as `before` (None: zeros). Sums are in float32 at least; y has x's dtype.

    documents (B, T): nothing enters from another document.
    """
    (B, T, C), W = x.shape, weight.shape[1]
    before = x.new_zeros(B, W - 1, C) if before is None else before.to(x.dtype)
    padded = torch.cat((before, x), 1)
    wide, weight = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (padded, weight))
    y = wide[:, W - 1 :] * weight[:, W - 1]
    number = None if documents is None else F.pad(runs(documents), (W - 1, 0), value=-1)
    for back in range(1, W):
        there = slice(W - 1 - back, W - 1 - back + T)
        term = wide[:, there]
        if number is not None:
            term = term * (number[:, W - 1 :] == number[:, there])[..., None]
        y = y.addcmul(term, weight[:, W - 1 - back])
    return y.to(x.dtype), padded[:, T:]
