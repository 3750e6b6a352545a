"""Text to tokens and back: byte-level BPE (train, encode), chat templates, loss masks.

`bpe.py` is the algorithm to read; `train.py` and `engines.py` run it fast; `tokenizer.py` is what the rest uses.
"""

from pellucid.tokenizers.patterns import PELLUCID_PATTERN
from pellucid.tokenizers.tokenizer import Tokenizer
from pellucid.tokenizers.train import train_bpe

__all__ = ["PELLUCID_PATTERN", "Tokenizer", "train_bpe"]
