"""Position scaling from config.json to frequencies and factor, against transformers' own functions."""

import pytest
import torch
from tiny_checkpoints import BASE, LONG, YARN
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pellucid.models import spec_of
from pellucid.ops import rope_angles, rope_frequencies

MSCALE = {"mscale": 0.707, "mscale_all_dim": 1.4}
KINDS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic-by-what-it-was-trained-for": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32},  # not by this field
    "yarn": YARN,
    "yarn-below-1": {**YARN, "factor": 0.5},
    "yarn-betas": {**YARN, "beta_fast": 3.0, "beta_slow": 0.25},
    "yarn-one-point": {**YARN, "original_max_position_embeddings": 6},  # both ends of the ramp fall on the first pair
    "yarn-ramp-beyond-the-last-pair": {**YARN, "rope_theta": 10.0, "original_max_position_embeddings": 1024},
    "yarn-untruncated": {**YARN, "beta_fast": 3.0, "truncate": False},
    "yarn-given": {**YARN, **MSCALE, "attention_factor": 1.25},
    "yarn-mscale": {**YARN, **MSCALE},
    "yarn-half-an-mscale": {**YARN, "mscale": 0.707},
    "yarn-other-half": {**YARN, "mscale_all_dim": 0.707},
    "yarn-by-ratio": {**YARN, "factor": None},
    "yarn-no-original": {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"},
    "longrope": LONG,
    "longrope-factor": {**LONG, "factor": 16.0},
    "longrope-given": {**LONG, "attention_factor": 1.5},
    "longrope-short-only": {k: v for k, v in LONG.items() if k != "original_max_position_embeddings"},
}


def both(kind, length, theta=1e4, older=False, **more):
    """((frequencies, factor) of transformers, ours)"""
    parameters = {"rope_theta": theta, **KINDS[kind]}
    if "short_factor" not in parameters:  # those have a number for each of 6 pairs
        more["head_dim"] = 64  # enough pairs for all parts of a ramp
    theirs = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](LlamaConfig(**BASE, **more, rope_parameters=dict(parameters)), "cpu", seq_len=length)
    fields = {"model_type": "llama", **BASE, **more, "rope_parameters": parameters}
    if older:
        parameters = fields.pop("rope_parameters")
        fields |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": {"type": parameters.pop("rope_type"), **parameters}}
    rope = spec_of(fields).layers[0].mixer.rope
    return theirs, (rope_frequencies(rope.dim, rope.theta, rope.scaling_dict, length), rope.attention_factor)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("length", [1, 32, 33, 128, 129, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_and_factor(kind, length, older):
    """Inside, at the border of, and beyond the original context (32) and the trained one (128). Bit by bit: at position 100,000,
    the last one of a frequency moves an angle by 0.006."""
    (f, factor), (ours, our_factor) = both(kind, length, older=older)
    assert torch.equal(ours, f)
    assert our_factor == pytest.approx(factor, rel=1e-12)


def test_a_field_beside_the_scaling_wins_over_one_inside():
    """Phi-3's place for the original context."""
    (f, factor), (ours, our_factor) = both("longrope", 20, original_max_position_embeddings=16)
    torch.testing.assert_close(ours, f, rtol=2e-6, atol=0)
    assert our_factor == pytest.approx(factor) and our_factor != both("longrope", 20)[1][1]


def test_kinds_and_variants_differ():
    found = {kind: both(kind, 1000)[1] for kind in KINDS}
    values = {(tuple(f.tolist()), factor) for f, factor in found.values()}
    # both halves are needed, the ratio is 4; dynamic has no other original context than max_position_embeddings
    same = {"yarn-half-an-mscale", "yarn-other-half", "yarn-by-ratio", "dynamic-by-what-it-was-trained-for"}
    assert len(values) == len(KINDS) - len(same)


def test_real_sizes_beyond_the_original_context():
    """Qwen2.5's: 128 entries, theta 1e6, 32768 times 4."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, max_position_embeddings=131072,
                         rope_parameters={**scaling, "rope_theta": 1e6})
    f, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = rope_frequencies(128, 1e6, scaling)
    assert torch.equal(ours, f)
    at = torch.tensor([[0, 1, 32767, 32768, 131071]])
    cos, sin = rope_angles(at, ours, factor=factor)
    angles = at[..., None].double() * f.double()
    # an angle of 131071 has an ulp of 0.008, and the two frequencies differ in their last bits
    assert (cos[..., :64] - angles.cos() * factor).abs().max() < 0.05 and (sin[..., :64] - angles.sin() * factor).abs().max() < 0.05
    torch.testing.assert_close(cos[0, :2, :64], (angles.cos() * factor).float()[0, :2], rtol=0, atol=1e-5)
