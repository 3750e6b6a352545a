"""How equal: for every family, the largest difference of logits from the reference, over the tiny random checkpoints of the tests.

    pellucid bench parity
    python benchmarks/parity.py --json benchmarks/results/parity.json

Each checkpoint is written by transformers with every tensor redrawn (tests/models/tiny_checkpoints.py, tiny_encoders.py), read by
pellucid, and run on 2 x 100 tokens (the original context is 32 in the cases with scaled positions), in float32. The figure is
max |ours - theirs| / max(1, max |theirs|); the tests allow 1e-5. `back`: the same for our weights, saved and opened by transformers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import pellucid
from common import begin, finish, options

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "models"))
import tiny_checkpoints as decoders
import tiny_encoders as others


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / max(1.0, float(want.abs().max())))


def decoder(name: str, folder: Path) -> tuple[str, float, float]:
    """(model_type, from their files, from ours)"""
    from transformers import AutoModelForCausalLM

    theirs = decoders.written(name, folder / "theirs")
    x = decoders.tokens(2, 100)
    ours = pellucid.load(folder / "theirs")
    there = difference(ours(x), theirs(input_ids=x).logits)
    pellucid.save(ours, folder / "ours", generation={"eos_token_id": 2, "pad_token_id": 0})
    back = AutoModelForCausalLM.from_pretrained(folder / "ours", attn_implementation="eager")
    return theirs.config.model_type, there, difference(back(input_ids=x).logits, ours(x))


def other(name: str, folder: Path) -> tuple[str, float, float]:
    theirs = others.written(name, folder / "theirs")
    ours = pellucid.load(folder / "theirs")
    pellucid.save(ours, folder / "ours")
    back = type(theirs).from_pretrained(folder / "ours", attn_implementation="eager")
    inputs = example(theirs, name)
    return theirs.config.model_type, difference(outputs(ours, inputs), reference(theirs, inputs)), difference(
        reference(back, inputs), outputs(ours, inputs))


def example(model: Any, name: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    if model.config.model_type == "clip":
        vision = model.config.vision_config
        ids[:, -1] = 95 if model.config.text_config.eos_token_id == 95 else ids.max() + 1
        pixels = torch.randn(2, vision.num_channels, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(1))
        return {"input_ids": ids, "pixel_values": pixels}
    if model.config.model_type == "marian":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :12]}
    return {"input_ids": ids}


def reference(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(**inputs)
    if hasattr(out, "logits_per_image"):
        return out.logits_per_image  # type: ignore[no-any-return]
    return out.logits if hasattr(out, "logits") else out.last_hidden_state  # type: ignore[no-any-return]


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if "pixel_values" in inputs:
        return model(inputs["input_ids"], inputs["pixel_values"])  # type: ignore[no-any-return]
    if "decoder_input_ids" in inputs:
        return model(inputs["input_ids"], inputs["decoder_input_ids"])  # type: ignore[no-any-return]
    hidden = model(inputs["input_ids"])
    return model.logits(hidden) if model.spec.head else hidden  # type: ignore[no-any-return]


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    chosen = options(__doc__).parse_args(argv)
    result = begin("parity", chosen)
    families: dict[str, dict[str, Any]] = {}
    for module, run in ((decoders, decoder), (others, other)):
        for name in module.CASES:
            with tempfile.TemporaryDirectory() as folder:
                family, there, back = run(name, Path(folder))
            row = families.setdefault(family, {"cases": [], "logits": 0.0, "back": 0.0})
            row["cases"].append(name)
            row["logits"], row["back"] = max(row["logits"], there), max(row["back"], back)
    for family, row in sorted(families.items()):
        print(f"  {family:20} {row['logits']:.1e}  back {row['back']:.1e}  ({len(row['cases'])} checkpoints)", flush=True)
    return finish(result | {"tolerance": 1e-5, "families": families}, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
