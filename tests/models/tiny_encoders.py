"""Tiny random checkpoints of encoders, encoder-decoders and dual encoders, written by transformers, every persistent tensor redrawn."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from tiny_checkpoints import IDS
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
)

BERT = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64}
TEXT = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 32, "bos_token_id": 94, "eos_token_id": 95, "pad_token_id": 1}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
MARIAN = {"vocab_size": 96, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "activation_function": "relu",
          "scale_embedding": True, "max_position_embeddings": 64, "decoder_start_token_id": 0, "forced_eos_token_id": None, **IDS}

CASES = {
    "bert": (BertModel, BertConfig(**BERT)),
    "bert-mlm": (BertForMaskedLM, BertConfig(**{**BERT, "type_vocab_size": 3, "layer_norm_eps": 1e-3, "hidden_act": "gelu_new"})),
    "bert-classifier": (BertForSequenceClassification, BertConfig(**{**BERT, "num_attention_heads": 3},
                                                                 id2label={0: "no", 1: "perhaps", 2: "yes"}, label2id={"no": 0, "perhaps": 1, "yes": 2})),
    "clip": (CLIPModel, CLIPConfig(projection_dim=40, text_config=TEXT, vision_config=VISION)),
    "clip-old": (CLIPModel, CLIPConfig(  # the wrong end token of older files, sides that are no whole number of patches
        projection_dim=24, text_config={**TEXT, "eos_token_id": 2, "hidden_act": "gelu", "num_hidden_layers": 3, "layer_norm_eps": 1e-3},
        vision_config={**VISION, "image_size": 18, "layer_norm_eps": 1e-4, "num_channels": 1})),
    "marian": (MarianMTModel, MarianConfig(**MARIAN)),
    "marian-two": (MarianMTModel, MarianConfig(**{  # two vocabularies, sides of different sizes
        **MARIAN, "decoder_layers": 1, "decoder_ffn_dim": 56, "decoder_attention_heads": 2, "activation_function": "swish",
        "scale_embedding": False, "decoder_vocab_size": 70}, share_encoder_decoder_embeddings=False)),
}


def written(name: str, folder: Path, **options: object) -> PreTrainedModel:
    """The reference model of a case (eager attention, float32), after writing it to `folder`."""
    kind, config = CASES[name]
    model = kind._from_config(deepcopy(config), attn_implementation="eager")
    redraw(model)
    model.save_pretrained(folder, **options)
    return model.eval()


@torch.no_grad()
def redraw(model: torch.nn.Module, seed: int = 0) -> None:
    """Every tensor of the state but the sinusoids, which no file holds."""
    g = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        if "embed_positions" in key:
            continue
        noise = torch.randn(tensor.shape, generator=g)
        norm = key.endswith("weight") and ("norm" in key.lower() or "layrnorm" in key)
        tensor.copy_(1 + 0.3 * noise if norm else 0.2 * noise if tensor.ndim else 1.7 + 0.3 * noise)
    if hasattr(model, "tie_weights"):
        model.tie_weights()


def padded(B: int, T: int, lengths: list[int], seed: int = 0, low: int = 3, high: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens (B, T) and their mask, padded on the right with 1."""
    x = torch.randint(low, high, (B, T), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(T)[None] < torch.tensor(lengths)[:, None]).long()
    return x.masked_fill(mask == 0, 1), mask


# --- tokenizers of these vocabularies -----------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def wordpiece(folder: Path) -> None:
    """A BERT tokenizer of 96 words in `folder`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), "the", "cat", "dog", "##ing", "run", ".", "?", "!"]
    words += [f"[x{i}]" for i in range(96 - len(words))]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True).save_pretrained(folder)


def clip_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of 96 tokens in `folder`, the last two of them begin and end."""
    tokens = [*LETTERS, ".", *(f"{c}</w>" for c in LETTERS), ".</w>", "ca", "cat</w>", "do", "dog</w>", "th", "the</w>", "of</w>"]
    tokens += [f"<x{i}>" for i in range(94 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("t", "h"), ("th", "e</w>"), ("o", "f</w>")]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges).save_pretrained(folder)
