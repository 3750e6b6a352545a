"""What encoders, encoder-decoders and dual encoders are trained on: losses equal to transformers', and each learns a small task."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_checkpoints import assert_equal
from tiny_encoders import padded, written

import pellucid
from pellucid.engine import SamplingParams, translate
from pellucid.nn import (
    DualEncoder,
    DualEncoderSpec,
    Encoder,
    EncoderDecoder,
    EncoderDecoderSpec,
    EncoderSpec,
    VisionSpec,
    init_weights,
)
from pellucid.nn.specs import MLP, Attn, Layer, Rope
from pellucid.ops import contrastive_loss
from pellucid.train.encoders import (
    LARGEST_SCALE,
    bound_scale,
    mask_tokens,
    masked_loss,
    pair_loss,
    shifted,
    translation_loss,
)


def opened(name, folder):
    return written(name, folder), pellucid.load(folder)


def test_masked_loss_equals_bertformaskedlm(tmp_path):
    theirs, ours = opened("bert-mlm", tmp_path)
    x, mask = padded(3, 20, [20, 7, 2])
    labels = torch.where((torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.4) & mask.bool(), x, -100)
    want = theirs(input_ids=x, attention_mask=mask, labels=labels).loss
    total, count = masked_loss(ours, x, labels, mask)
    assert count == int((labels != -100).sum())
    assert_equal(total / count, want)
    want.backward()
    (total / count).backward()
    assert_equal(ours.embed.weight.grad, theirs.bert.embeddings.word_embeddings.weight.grad)


def test_pair_loss_equals_clipmodel(tmp_path):
    theirs, ours = opened("clip", tmp_path)
    x, mask = padded(4, 20, [20, 7, 2, 9])
    x[torch.arange(4), mask.sum(1) - 1] = 95
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    want = theirs(input_ids=x, attention_mask=mask, pixel_values=pixels, return_loss=True).loss
    got = pair_loss(ours, x, pixels, mask)
    assert_equal(got, want)
    want.backward()
    got.backward()
    assert_equal(ours.logit_scale.grad, theirs.logit_scale.grad)
    assert_equal(ours.vision.patches.weight.grad, theirs.vision_model.embeddings.patch_embedding.weight.grad)


def test_contrastive_loss_by_hand():
    """Two pairs at right angles: every softmax is exp(s) / (exp(s) + 1); lengths do not matter."""
    a, b = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 7.0]])
    assert float(contrastive_loss(a, b, 2.0)) == pytest.approx(float(-torch.tensor(2.0).sigmoid().log()))
    assert float(contrastive_loss(a, b.flip(0), 2.0)) == pytest.approx(float(-torch.tensor(-2.0).sigmoid().log()))


@pytest.mark.parametrize("name", ["marian", "marian-two"])
def test_translation_loss_equals_marian(name, tmp_path):
    theirs, ours = opened(name, tmp_path)
    x, mask = padded(3, 20, [20, 7, 2])
    y, target_mask = padded(3, 9, [9, 4, 2], 1)
    labels = y.masked_fill(target_mask == 0, -100)
    want = theirs(input_ids=x, attention_mask=mask, labels=labels)
    total, count = translation_loss(ours, x, labels, mask)
    assert_equal(total / count, want.loss)
    smooth = F.cross_entropy(want.logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert_equal(translation_loss(ours, x, labels, mask, smoothing=0.1)[0] / count, smooth)
    with torch.no_grad():
        theirs.final_logits_bias.zero_()
        ours.logits_bias = None  # then the chunked loss does it
        assert_equal(translation_loss(ours, x, labels, mask)[0] / count, theirs(input_ids=x, attention_mask=mask, labels=labels).loss)


def test_what_the_decoder_reads():
    assert shifted(torch.tensor([[5, 6, 2, -100, -100]]), 0).tolist() == [[0, 5, 6, 2, 0]]


def test_masking_has_the_papers_shares():
    tokens = torch.arange(5, 105).repeat(400, 1)
    choosable = torch.ones_like(tokens, dtype=torch.bool)
    choosable[:, :10] = False
    read, labels = mask_tokens(tokens, choosable, mask_id=4, vocab=1000, generator=torch.Generator().manual_seed(0))
    chosen = labels != -100
    assert not chosen[:, :10].any() and torch.equal(read[~chosen], tokens[~chosen]) and torch.equal(labels[chosen], tokens[chosen])
    assert float(chosen[:, 10:].float().mean()) == pytest.approx(0.15, abs=0.01)
    shares = [float(part.float().mean()) for part in (read[chosen] == 4, read[chosen] == tokens[chosen])]
    assert shares == [pytest.approx(0.8, abs=0.02), pytest.approx(0.1, abs=0.02)]
    again = mask_tokens(tokens, choosable, mask_id=4, vocab=1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again[0], read) and torch.equal(again[1], labels)


# --- learning ---------------------------------------------------------------------------------------------------------


def layer(causal=False, cross=False, order="pre", act="gelu", dim=32):
    attn = Attn(2, 2, dim // 2, Rope(0), True, True, causal=causal)
    return Layer(attn, MLP(2 * dim, act, True, False), order, Attn(2, 2, dim // 2, Rope(0), True, True, causal=False) if cross else None)


def learned(model, loss, steps, lr):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    first = last = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        first, last = first or float(value), float(value)
    return first, last


def motifs(count, seed):
    """Rows of 12 tokens: three random ones, four times."""
    return torch.randint(5, 15, (count, 3), generator=torch.Generator().manual_seed(seed)).repeat(1, 4)


def test_bert_learns_to_fill_in_a_pattern():
    """A masked token is what stands three places away: only attention to both sides can tell."""
    model = init_weights(Encoder(EncoderSpec(16, 32, (layer(order="post"),) * 2, context=12, embed_norm=True, head="mlm")), seed=0)
    g = torch.Generator().manual_seed(0)

    def loss(step):
        tokens = motifs(64, step)
        read, labels = mask_tokens(tokens, torch.ones_like(tokens, dtype=torch.bool), 4, 16, g)
        total, count = masked_loss(model, read, labels)
        return total / count

    learned(model, loss, 250, 4e-3)
    tokens = motifs(200, 10_000)
    read = tokens.clone()
    read[:, 4] = 4
    with torch.no_grad():
        right = model.logits(model(read))[:, 4].argmax(-1) == tokens[:, 4]
    assert right.float().mean() > 0.9


def scenes(count, seed):
    """Pictures 8 x 8 with a bright half, and captions of three tokens: which colour, which half, the end."""
    g = torch.Generator().manual_seed(seed)
    colour, half = (torch.randint(n, (count,), generator=g) for n in (3, 2))
    pixels = 0.5 * torch.randn(count, 3, 8, 8, generator=g)
    rows = torch.arange(8)[None, :] // 4 == half[:, None]
    pixels[torch.arange(count), colour] += 1.5 * rows[:, :, None]
    return torch.stack((1 + colour, 4 + half, torch.full_like(half, 7)), 1), pixels


def test_clip_learns_which_caption_is_whose():
    text = EncoderSpec(8, 32, (layer(causal=True),) * 2, context=3, final_norm=True)
    model = init_weights(DualEncoder(DualEncoderSpec(text, VisionSpec(32, (layer(),) * 2, 8, 4), 16, 7)), seed=0)

    def loss(step):
        bound_scale(model)
        return pair_loss(model, *scenes(32, step))

    learned(model, loss, 300, 5e-3)
    captions = torch.tensor([[1 + c, 4 + h, 7] for c in range(3) for h in range(2)])
    tokens, pixels = scenes(200, 10_000)
    with torch.no_grad():
        chosen = captions[model(captions, pixels).argmax(-1)]
    assert (chosen == tokens).all(-1).float().mean() > 0.95
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    bound_scale(model)
    assert float(model.logit_scale) == pytest.approx(LARGEST_SCALE)


def test_the_original_transformer_learns_to_reverse():
    """Post-norm, sinusoids, label smoothing: the paper's own recipe, on sequences of which each target is the source backwards."""
    side = layer(order="post", act="relu"), layer(True, True, "post", "relu")
    spec = EncoderDecoderSpec(16, 32, side[:1] * 2, side[1:] * 2, context=16, positions="sinusoid-pairs", embed_scale=32**0.5, start=0, end=1)
    model = init_weights(EncoderDecoder(spec), seed=0)

    def pairs(seed, count=64):
        source = torch.randint(2, 16, (count, 6), generator=torch.Generator().manual_seed(seed))
        return source, torch.cat((source.flip(1), torch.ones(count, 1, dtype=torch.int64)), 1)

    def loss(step):
        total, count = translation_loss(model, *pairs(step), smoothing=0.1)
        return total / count

    learned(model, loss, 300, 4e-3)
    source, target = pairs(10_000, 50)
    got = translate(model, source.tolist(), SamplingParams(max_tokens=9), beams=2)
    assert sum(ts[0].tokens == want for ts, want in zip(got, target.tolist(), strict=True)) >= 45
