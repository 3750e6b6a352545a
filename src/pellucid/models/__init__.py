"""Model families, weights in and out, and what encoders are for: vectors of texts, classes, labels of pictures."""

from pellucid.models.embedding import classify_texts, embed_texts
from pellucid.models.hub import load, save, spec_of
from pellucid.models.zero_shot import zero_shot

__all__ = ["classify_texts", "embed_texts", "load", "save", "spec_of", "zero_shot"]
