"""Writing with encoder-decoders: greedy and beam search token for token equal to transformers' generate, with its scores."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_encoders import padded, redraw, written

import pellucid
from pellucid.engine import SamplingParams, translate
from pellucid.errors import BadInput

LENGTHS = [20, 7, 1, 12, 3]


@pytest.fixture(scope="module", params=[("marian", 0), ("marian", 3), ("marian-two", 3)], ids=["marian", "another", "two"])
def pair(request, tmp_path_factory):
    name, seed = request.param
    folder = tmp_path_factory.mktemp(name)
    theirs = written(name, folder)
    redraw(theirs, seed)
    with torch.no_grad():
        theirs.final_logits_bias[0, 2] += 1.5  # so that some targets end
    theirs.save_pretrained(folder)
    x, mask = padded(5, 20, LENGTHS, seed)
    return theirs, pellucid.load(folder), x, mask


@pytest.mark.parametrize("options", [
    {"num_beams": 1}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 2, "length_penalty": 0.0, "early_stopping": True},
    {"num_beams": 5, "early_stopping": True, "length_penalty": 0.5}], ids=str)
def test_tokens_and_scores_equal_generate(pair, options):
    theirs, ours, x, mask = pair
    want = theirs.generate(input_ids=x, attention_mask=mask, max_new_tokens=14, do_sample=False, return_dict_in_generate=True, output_scores=True, **options)
    beams = options["num_beams"]
    got = translate(ours, [row[:n].tolist() for row, n in zip(x, LENGTHS)], SamplingParams(max_tokens=14), beams=beams,
                    **{name: value for name, value in options.items() if name != "num_beams"})
    for row, targets in enumerate(got):
        tokens = want.sequences[row, 1:].tolist()
        tokens = tokens[: tokens.index(2) + 1] if 2 in tokens else tokens
        assert targets[0].tokens == tokens and targets[0].finish_reason == ("stop" if tokens[-1] == 2 else "length")
        if beams > 1:
            assert targets[0].score == pytest.approx(float(want.sequences_scores[row]), abs=1e-4)


def test_the_n_best(pair):
    theirs, ours, x, mask = pair
    want = theirs.generate(input_ids=x, attention_mask=mask, max_new_tokens=9, num_beams=4, num_return_sequences=3, do_sample=False)
    got = translate(ours, [row[:n].tolist() for row, n in zip(x, LENGTHS)], SamplingParams(max_tokens=9, n=3), beams=4)
    for row, targets in enumerate(got):
        assert len(targets) == 3 and targets[0].score >= targets[1].score >= targets[2].score
        for k, target in enumerate(targets):
            tokens = want[3 * row + k, 1:].tolist()
            assert target.tokens == (tokens[: tokens.index(2) + 1] if 2 in tokens else tokens)


def test_the_size_of_a_batch_changes_nothing(pair):
    _, ours, x, _ = pair
    sources = [row[:n].tolist() for row, n in zip(x, LENGTHS)]
    for beams in (1, 3):
        whole = translate(ours, sources, SamplingParams(max_tokens=10), beams=beams)
        assert [[t.tokens for t in ts] for ts in translate(ours, sources, SamplingParams(max_tokens=10), beams=beams, max_batch=1)] == [
            [t.tokens for t in ts] for ts in whole]


def test_samples(pair):
    """A seed gives the same samples; their score is the log-probability that the model gives them."""
    _, ours, x, _ = pair
    source, params = x[0].tolist(), SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=4)
    first = translate(ours, [source], params)[0]
    assert [t.tokens for t in first] == [t.tokens for t in translate(ours, [x[3][:12].tolist(), source], params)[1]]
    assert len({tuple(t.tokens) for t in first}) > 1
    for target in first:
        read = torch.tensor([[ours.spec.start, *target.tokens[:-1]]])
        with torch.no_grad():
            logp = ours(x[:1], read).log_softmax(-1)[0]
        assert target.score == pytest.approx(float(logp[torch.arange(len(target.tokens)), torch.tensor(target.tokens)].sum()), abs=1e-3)


def test_suppressed_tokens_are_never_written(pair):
    theirs, ours, x, mask = pair
    sources = [row[:n].tolist() for row, n in zip(x, LENGTHS)]
    free = translate(ours, sources, SamplingParams(max_tokens=10, ignore_eos=True))
    common = max({t for ts in free for t in ts[0].tokens}, key=lambda t: sum(ts[0].tokens.count(t) for ts in free))
    for beams in (1, 3):
        want = theirs.generate(input_ids=x, attention_mask=mask, max_new_tokens=10, num_beams=beams, do_sample=False, suppress_tokens=[common, 2])
        got = translate(ours, sources, SamplingParams(max_tokens=10), beams=beams, suppress=[common, 2])
        assert [ts[0].tokens for ts in got] == want[:, 1:].tolist()
        assert all(common not in t.tokens for ts in got for t in ts)


@pytest.mark.parametrize(("sources", "params", "beams"), [
    ([[]], SamplingParams(max_tokens=5), 1), ([[3] * 65], SamplingParams(max_tokens=5), 1), ([[3]], SamplingParams(max_tokens=64), 1),
    ([[3]], SamplingParams(max_tokens=5, temperature=1.0), 2), ([[3]], SamplingParams(max_tokens=5, n=3), 2), ([[3]], SamplingParams(max_tokens=5), 0)])
def test_what_cannot_be_asked(pair, sources, params, beams):
    with pytest.raises(BadInput):
        translate(pair[1], sources, params, beams=beams)
