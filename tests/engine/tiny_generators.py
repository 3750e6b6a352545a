"""A tiny Qwen3 with random weights, made and saved by transformers, and its answers by transformers' `generate`."""

from __future__ import annotations

import torch

VOCAB = 280


def hugging_face(folder, seed: int = 4, **shape):
    """The transformers model, whose weights lie in `folder`."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(**{
        **dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               head_dim=8, max_position_embeddings=128, initializer_range=0.25, attn_implementation="eager", pad_token_id=None,
               bos_token_id=None, eos_token_id=None), **shape})
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def generated(theirs, prompt: list[int], **options):
    with torch.no_grad():
        return theirs.generate(torch.tensor([prompt]), pad_token_id=0, return_dict_in_generate=True, **options)
