"""Where a block stands: what it needs to know of the model around it."""

from __future__ import annotations

from dataclasses import dataclass

from pellucid.nn.linear import NORMS, LayerNorm, RMSNorm


@dataclass(frozen=True)
class Site:
    """dim: model width. index: of the layer, which is its place in the cache."""

    dim: int
    eps: float
    norm: str
    index: int = 0

    def new_norm(self) -> RMSNorm | LayerNorm:
        """A norm of the residual stream."""
        return NORMS[self.norm](self.dim, self.eps)

    def head_norm(self, dim: int) -> RMSNorm:
        """A norm of query or key heads: RMS in every model, centred where the model's own norms are."""
        kind = NORMS[self.norm]
        return (kind if issubclass(kind, RMSNorm) else RMSNorm)(dim, self.eps)
