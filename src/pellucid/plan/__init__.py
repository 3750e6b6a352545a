"""What a model is and what it costs, from its config.json alone."""

from pellucid.plan.inspect import Inspection, inspect

__all__ = ["Inspection", "inspect"]
