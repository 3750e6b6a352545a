"""trl's preference trainers, built once on a tiny Qwen2; their loss functions are then called with a model that answers
with given log-probabilities: trl's own code on inputs of our choice, with a gradient on every token."""

from __future__ import annotations

import os
from functools import cache
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

COMMON = dict(use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, save_strategy="no", report_to=[],
              disable_tqdm=True, seed=3, per_device_train_batch_size=2)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklm"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def config(**changes) -> Qwen2Config:
    return Qwen2Config(**dict(
        vocab_size=len(tokenizer()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None) | changes)


def language_model(seed: int = 0, head: float = 8.0) -> Qwen2ForCausalLM:
    """Far from uniform (head x 8), so that temperatures and entropies matter."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config())
    with torch.no_grad():
        model.lm_head.weight.mul_(head)
    return model


def reward_model(seed: int = 0) -> Qwen2ForSequenceClassification:
    torch.manual_seed(seed)
    return Qwen2ForSequenceClassification(config(num_labels=1))


PAIRS = Dataset.from_dict({"prompt": ["ab", "cde", "f", "gh"], "chosen": ["abc", "d", "efghi", "ab"],
                           "rejected": ["b", "cdef", "ab", "mlkji"]})
UNPAIRED = Dataset.from_dict({"prompt": ["ab", "cde", "f", "gh"], "completion": ["abc", "d", "efghi", "ab"],
                              "label": [True, False, True, False]})


def dpo(out, model=None, ref=None, **options):
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(output_dir=str(out), **(COMMON | dict(max_steps=1) | options))
    return DPOTrainer(model or language_model(), ref_model=ref or language_model(1), args=args, train_dataset=PAIRS,
                      processing_class=tokenizer())


def kto(out, model=None, ref=None, **options):
    from trl import KTOConfig, KTOTrainer

    args = KTOConfig(output_dir=str(out), **(COMMON | dict(max_steps=1) | options))
    return KTOTrainer(model or language_model(), ref_model=ref or language_model(1), args=args, train_dataset=UNPAIRED,
                      processing_class=tokenizer())


def reward(out, model=None, **options):
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(output_dir=str(out), **(COMMON | dict(max_steps=1) | options))
    return RewardTrainer(model or reward_model(), args=args, train_dataset=PAIRS, processing_class=tokenizer())


def sft(out, **options):
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"prompt": ["ab", "cde"], "completion": ["abc", "d"]})
    args = SFTConfig(output_dir=str(out), **(COMMON | dict(max_steps=1) | options))
    return SFTTrainer(language_model(), args=args, train_dataset=data, processing_class=tokenizer())


class Answers:
    """A model that answers with the given numbers, in the form of trl's fused head."""

    training = True

    def __init__(self, *logps: Tensor, log_square: Tensor | None = None):
        self.logps, self.log_square, self.calls = list(logps), log_square, 0

    def __call__(self, **kwargs):
        logp = self.logps[min(self.calls, len(self.logps) - 1)]
        self.calls += 1
        zeros = torch.zeros_like(logp)
        return SimpleNamespace(log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), label_mask=logp != 0,
                               log_sum_sq_probs=zeros if self.log_square is None else self.log_square)
