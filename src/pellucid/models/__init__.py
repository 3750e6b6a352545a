"""Model families, and weights in and out."""

from pellucid.models.hub import load, save, spec_of

__all__ = ["load", "save", "spec_of"]
