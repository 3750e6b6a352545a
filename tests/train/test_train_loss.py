"""The language-modelling loss against transformers', and bits per byte by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training import SPEC, decoder, rows, samples

import pellucid
from pellucid.data.packing import IGNORE, Packed, pack_samples, pack_stream
from pellucid.tokenizers import patterns, train_bpe
from pellucid.train import bits_per_byte, held_out_loss, language_loss, token_bytes


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same random Qwen3 in transformers and here."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, attn_implementation="eager")).eval()
    folder = tmp_path_factory.mktemp("qwen3")
    theirs.save_pretrained(folder)
    return theirs, pellucid.load(folder)


def by_transformers(model, made):
    """(nats, labels) over samples (ids, mask), one at a time, by transformers' own loss."""
    nats, count = 0.0, 0
    for ids, mask in made:
        labels = torch.tensor([[i if m else -100 for i, m in zip(ids, mask)]])
        n = int((labels[:, 1:] != -100).sum())
        loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
        nats, count = nats + loss * n, count + n
    return nats, count


def test_packed_rows_have_the_loss_that_transformers_gives_their_samples(pair):
    theirs, ours = pair
    expected, n = by_transformers(theirs, samples())
    got, count = language_loss(ours, rows())
    assert count == n
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-5)


def test_the_gradient_is_that_of_transformers(pair):
    theirs, ours = pair
    theirs.zero_grad()
    ours.zero_grad()
    by_transformers(theirs, samples())[0].backward()
    language_loss(ours, rows())[0].backward()
    hub = dict(theirs.named_parameters())
    torch.testing.assert_close(ours.embed.weight.grad, hub["model.embed_tokens.weight"].grad, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(ours.head.weight.grad, hub["lm_head.weight"].grad, atol=2e-4, rtol=1e-4)
    down = hub["model.layers.1.mlp.down_proj.weight"].grad
    torch.testing.assert_close(ours.layers[1].ffn.down.weight.grad, down, atol=2e-4, rtol=1e-4)
    q = torch.cat([hub[f"model.layers.0.self_attn.{x}_proj.weight"].grad for x in "qkv"])
    torch.testing.assert_close(ours.layers[0].mixer.qkv.weight.grad, q, atol=2e-4, rtol=1e-4)


def test_a_stream_with_every_position_trained(pair):
    theirs, ours = pair
    documents = [ids for ids, _ in samples()]
    packed = pack_stream(documents, 16, remainder="pad")
    whole, n = by_transformers(theirs, [(ids, [True] * len(ids)) for ids in documents])
    nats, count = held_out_loss(ours, packed, batch=3)
    assert count == n
    # Documents that go on in the next row start anew there, so they lose context: only nearly the same number.
    assert nats / count == pytest.approx(float(whole.detach()) / n, rel=0.05)


def test_rows_without_any_label_give_zero_and_no_nan():
    model = decoder()
    packed = rows()
    nothing = Packed(packed.tokens, torch.full_like(packed.labels, IGNORE), packed.positions, packed.documents)
    loss, count = language_loss(model, nothing)
    assert (loss.item(), count) == (0.0, 0)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert held_out_loss(model, nothing) == (0.0, 0)


def test_padding_is_neither_read_nor_trained():
    model = decoder()
    packed = rows()
    assert (packed.documents < 0).any()
    other = packed.tokens.masked_fill(packed.documents < 0, 17)
    a = language_loss(model, packed)
    b = language_loss(model, Packed(other, packed.labels, packed.positions, packed.documents))
    assert a[0].item() == b[0].item() and a[1] == b[1]


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_held_out_loss_is_the_sum_over_documents(batch):
    model = decoder().train()
    made = samples(20, seed=3)
    nats, count = 0.0, 0
    with torch.no_grad():
        for ids, mask in made:
            logp = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
            picked = logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
            nats -= float(picked[torch.tensor(mask[1:])].sum())
            count += sum(mask[1:])
    got, n = held_out_loss(model, pack_samples(made, 40), batch=batch)
    assert n == count
    assert got == pytest.approx(nats, rel=1e-5)
    assert model.training  # as it was


def test_bits_per_byte_by_hand():
    sizes = torch.tensor([1, 2, 3, 0])
    # 8 bits over the labels 0, 1, 1, 2 (8 bytes), the special token 3 (0 bytes); the prompt does not count.
    labels = torch.tensor([[0, 1, IGNORE], [1, 2, 3]])
    assert bits_per_byte(8 * math.log(2), labels, sizes) == pytest.approx(1.0)
    assert bits_per_byte(4 * math.log(2), [2, -100, 3, 0], sizes) == pytest.approx(1.0)
    assert bits_per_byte(0.0, torch.full((2, 3), IGNORE), sizes) == 0.0


def test_a_flat_model_needs_log2_vocabulary_bits_a_token():
    model = decoder()
    with torch.no_grad():
        model.head_weight.zero_()
    packed = rows()
    nats, count = held_out_loss(model, packed)
    assert nats == pytest.approx(count * math.log(SPEC.vocab), rel=1e-6)
    assert bits_per_byte(nats, packed.labels, torch.full((60,), 2)) == pytest.approx(math.log2(60) / 2, rel=1e-6)


def test_token_bytes_add_up_to_the_size_of_the_text():
    tok = train_bpe(["hello world, hello worlds: 12 + 30"] * 3, 275, patterns.QWEN_PATTERN)
    sizes = token_bytes(tok)
    assert sizes.shape == (275,)
    for text in ("hello worlds", "澄明 😀 naïve", "<think>42</think>", ""):
        assert int(sizes[tok.encode(text)].sum()) == len(text.encode())
    assert sizes[tok.eos_ids].tolist() == [0] * len(tok.eos_ids)
