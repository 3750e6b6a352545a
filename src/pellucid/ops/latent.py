"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): two forms of one function, and the choice.

A token leaves one latent vector c and one rotated key k^R, which all heads share. Head h reads from them

    k_h = [U_h c ; k^R]    v_h = V_h c    o_h = softmax(scale q_h^T k_h) v_h        with q_h = [q^N_h ; q^R_h]

expanded: keys and values of all heads are made, then attention is as usual. Every key costs a product with U and V.
absorbed: (q^N)^T (U c) = (U^T q^N)^T c, and sum_j p_j (V c_j) = V (sum_j p_j c_j): queries meet the latents themselves, as
many heads on one key of c + r entries (MQA). Every query costs that product, and every score is longer.

Legend: B batch, H heads, T queries, S keys; n entries of q^N, r of q^R and k^R, c of a latent, e of a value.
    q_nope (B, H, T, n)   q_rope (B, H, T, r)   latent (B, 1, S, c)   k_rope (B, 1, S, r)
    up (H, n + e, c): U_h over V_h              ->   (B, H, T, e)
causal, mask, scale (here of n + r entries): as in `ops.attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.ops.attention import attention, attention_reference
from pellucid.ops.visible import bias_of


def latent_attention_reference(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, *, causal: bool = True,
    mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:
    """The three equations above, head by head, in float32 at least."""
    n = q_nope.shape[-1]
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    c, k_R = latent[:, 0].to(wide), k_rope[:, 0].to(wide)
    heads = []
    for h, (U, V) in enumerate(zip(up[:, :n].to(wide), up[:, n:].to(wide), strict=True)):
        q = torch.cat((q_nope[:, h], q_rope[:, h]), -1).to(wide)
        k, v = torch.cat((c @ U.mT, k_R), -1), c @ V.mT
        heads.append(attention_reference(q[:, None], k[:, None], v[:, None], causal=causal, mask=mask, scale=scale))
    return torch.cat(heads, 1).to(q_nope.dtype)


def latent_attention_expanded(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, *, causal: bool = True,
    mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:
    """Keys and values of every head first: for prefill and training."""
    H, n, dtype = q_nope.shape[1], q_nope.shape[-1], q_nope.dtype
    kv = F.linear(latent[:, 0].to(dtype), up.to(dtype).flatten(0, 1)).unflatten(-1, (H, -1)).transpose(1, 2)
    k_nope, v = kv[..., :n], kv[..., n:]
    k = torch.cat((k_nope, k_rope.to(dtype).expand(-1, H, -1, -1)), -1)
    return attention(torch.cat((q_nope, q_rope), -1), k, v, causal=causal, mask=mask, scale=scale)


def latent_attention_absorbed(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, *, causal: bool = True,
    mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:
    """The up-projections move to the other side: for decoding against a cache of latents."""
    T, n, dtype = q_nope.shape[2], q_nope.shape[-1], q_nope.dtype
    scale = (n + q_rope.shape[-1]) ** -0.5 if scale is None else scale
    U, V = up[:, :n].to(dtype), up[:, n:].to(dtype)
    q = torch.einsum("bhtn,hnc->bhtc", q_nope, U).to(latent.dtype)  # a cache may be narrower than what computes
    q_rope = q_rope.to(latent.dtype)
    if T == 1:
        mixed = _one_query(q, q_rope, latent, k_rope, mask, scale)
    else:
        mixed = attention(torch.cat((q, q_rope), -1), torch.cat((latent, k_rope), -1), latent, causal=causal, mask=mask, scale=scale)
    return torch.einsum("bhtc,hec->bhte", mixed.to(dtype), V)


def _one_query(q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The last position: H rows meet each latent once; latents and rotated keys are read where they lie, not copied together."""
    blind = None
    if mask is not None and mask.dtype == torch.bool:
        blind, mask = ~mask.any(-1, keepdim=True), bias_of(mask, q.dtype)
    turned = q_rope[:, :, 0] @ k_rope[:, 0].mT  # (B, H, S)
    scores = torch.baddbmm(turned, q[:, :, 0], latent[:, 0].mT, beta=scale, alpha=scale)
    if mask is not None:
        scores = scores + mask[:, :, 0]
    out = (torch.softmax(scores, -1) @ latent[:, 0])[:, :, None]
    return out if blind is None else out.masked_fill(blind, 0.0)


def choose_latent_attention(T: int, S: int, nope: int, rope: int, latent: int, value: int) -> tuple[str, str]:
    """('expanded' | 'absorbed', why): whichever multiplies less, for T queries of one head against S keys.

    expanded: S c (n + e) for keys and values, n + r + e for each of T S pairs.
    absorbed: T c (n + e) for queries and results, 2 c + r for each pair: in DeepSeek-V3 that is 3.4 times as much, and
    worth it up to some 170 queries against a long cache.
    """
    product = latent * (nope + value)
    expanded = S * product + T * S * (nope + rope + value)
    absorbed = T * product + T * S * (2 * latent + rope)
    choice = "absorbed" if absorbed < expanded else "expanded"
    return choice, f"{T} queries, {S} keys: absorbed multiplies {absorbed / expanded:.2f} times as much as expanded"


def latent_attention(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, *, causal: bool = True,
    mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:
    """The form that suits the shapes; `latent_attention_reference` is what it must equal."""
    n, r = q_nope.shape[-1], q_rope.shape[-1]
    choice, _ = choose_latent_attention(q_nope.shape[2], latent.shape[2], n, r, latent.shape[-1], up.shape[1] - n)
    form = latent_attention_absorbed if choice == "absorbed" else latent_attention_expanded
    return form(q_nope, q_rope, latent, k_rope, up, causal=causal, mask=mask, scale=scale)
