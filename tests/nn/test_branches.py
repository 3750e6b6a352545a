"""Several continuations of one text, behind it in one row, equal each of them behind its own copy: logits and gradients."""

import dataclasses

import pytest
import torch
from small_specs import SPECS, assert_equal, built, spec, tokens

from pellucid.nn import MLA, MLP, Attn, Decoder, Layer, Rope, init_weights
from pellucid.nn.context import branching, document_mask
from pellucid.nn.specs import GDN, Indexer, MoE, Streaming

SERVED = [name for name, s in SPECS.items() if branching(s) is None]
STEMS = ((11, (40, 70, 3, 1)), (64, (61,)), (30, (65, 30)))  # tokens of the text, and of its continuations: up to two tiles


def tree():
    """(tokens, positions, documents, parents) of rows of 125, and each continuation by itself: (row, ids, where it stands)."""
    x, T = tokens(len(STEMS), 125), 125
    positions, documents, parents = torch.zeros_like(x), torch.full_like(x, -1), torch.full_like(x, -2)
    alone = []
    for row, (stem, branches) in enumerate(STEMS):
        positions[row, :stem], documents[row, :stem] = torch.arange(stem), 99
        at = stem
        for i, n in enumerate(branches):
            here = slice(at, at + n)
            positions[row, here], documents[row, here], parents[row, here] = torch.arange(stem, stem + n), i, 99
            alone.append((row, torch.cat((x[row, :stem], x[row, here]))[None], here))
            at += n
        assert at <= T
    return x, positions, documents, parents, alone


def test_what_is_served():
    assert set(SPECS) - set(SERVED) == {"window", "gemma3", "delta", "delta-only", "streaming", "dual-chunk"}
    assert len(SERVED) > 6


@pytest.mark.parametrize("name", SERVED)
def test_logits_and_gradients(name):
    model = built(name)
    x, positions, documents, parents, alone = tree()
    together = model.logits(model.hidden(x, positions=positions, documents=documents, parents=parents))
    upstream = torch.randn(together.shape, generator=torch.Generator().manual_seed(3))
    loss, want_loss = torch.zeros(()), torch.zeros(())
    for row, ids, here in alone:
        want = model(ids)[0, -(here.stop - here.start) :]
        assert_equal(together[row, here], want)
        loss, want_loss = loss + (together[row, here] * upstream[row, here]).sum(), want_loss + (want * upstream[row, here]).sum()
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(want_loss, parameters), strict=True):
        assert_equal(a / b.abs().max(), b / b.abs().max())


def test_a_brother_changes_nothing_and_the_text_before_does():
    model = built("qwen3")
    x, positions, documents, parents, _ = tree()
    with torch.no_grad():
        before = model.hidden(x, positions=positions, documents=documents, parents=parents)
        y = x.clone()
        y[0, 11:51] = (y[0, 11:51] + 1) % 61  # the first continuation of row 0
        y[2, 29] = (y[2, 29] + 1) % 61  # the last token of the text of row 2
        after = model.hidden(y, positions=positions, documents=documents, parents=parents)
    assert torch.equal(before[0, :11], after[0, :11]) and torch.equal(before[0, 51:], after[0, 51:]) and torch.equal(before[1], after[1])
    assert (before[2, 30:125] - after[2, 30:125]).abs().amax(-1).min() > 0


def test_the_mask():
    documents, parents = torch.tensor([[7, 7, 0, 0, 1, -1]]), torch.tensor([[-2, -2, 7, 7, 7, -2]])
    seen = document_mask(documents, parents)[0, 0].int().tolist()
    assert seen == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]


ATTN, ROPE = Attn(4, 2, 8, Rope(8)), Rope(8)


@pytest.mark.parametrize("layer", [
    Layer(dataclasses.replace(ATTN, window=4), MLP(8)), Layer(GDN(2, 2, 4, 4), MLP(8)), Layer(dataclasses.replace(ATTN, reach=Streaming(2, 9)), MLP(8)),
    Layer(MLA(2, 4, 4, 4, 4, ROPE, indexer=Indexer(1, 8, 2)), MLP(8)), Layer(ATTN, MoE(4, 2, 8, capacity=1.0)),
    Layer(ATTN, MoE(4, 2, 8, expert_choice=True)), Layer(ATTN, MoE(4, 2, 8, select_bias=True))], ids=lambda layer: f"{layer.mixer}{layer.ffn}"[:60])
def test_who_counts_tokens_is_refused(layer):
    """One such layer among others is enough."""
    s = dataclasses.replace(SPECS["qwen3"], layers=(SPECS["qwen3"].layers[0], layer))
    assert branching(s) is not None


def test_a_mixture_without_a_limit_is_served():
    s = spec(ATTN, ATTN)
    s = dataclasses.replace(s, layers=tuple(dataclasses.replace(layer, ffn=MoE(4, 2, 12, shared=8)) for layer in s.layers))
    assert branching(s) is None
    model = init_weights(Decoder(s), 0).eval()
    x, positions, documents, parents, alone = tree()
    with torch.no_grad():
        together = model.hidden(x, positions=positions, documents=documents, parents=parents)
        for row, ids, here in alone:
            assert_equal(together[row, here], model.hidden(ids)[0, -(here.stop - here.start) :])
