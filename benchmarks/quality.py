"""What INT8 and INT4 weights cost in perplexity, on a model that this project trained.

    pellucid bench quality --minutes 12                      # trains a model of 2M parameters first, on Python's documentation
    pellucid bench quality --model runs/grow/model           # or measures a folder that is there

Trained on the standard library's documentation (what every machine has), measured on the part that was held out by
content. Every variant runs as `pellucid serve` would run it: quantized products, quantized head. Reference is the
same model in bfloat16; float32 stands beside it. Goals: INT8 at most 0.5 %, INT4 at most 3 % more perplexity.
The folder stays in runs/quality, so that a second call can use it with --model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import begin, finish, options
from pellucid.data import corpora, packing
from pellucid.data.split import divide
from pellucid.models import load, save
from pellucid.nn import MLP, Attn, Decoder, DecoderSpec, Layer, Rope, count_parameters, init_weights
from pellucid.optim import OptimConfig, Schedule
from pellucid.quant import GOALS, quality, rows_of
from pellucid.tokenizers import Tokenizer, train_bpe
from pellucid.train import Loop, LoopConfig

FOLDER = Path("runs/quality")
LAYER = Layer(Attn(6, 2, 32, Rope(32), qk_norm=True), MLP(512))
SPEC = DecoderSpec(2048, 192, (LAYER,) * 5, tied=True, context=512, family="qwen3")
ROW, ROWS = 256, 8
HISTORY = "training.json"  # beside a model that was trained here


def trained(folder: Path, minutes: float) -> dict[str, Any]:
    """A model folder, and how it was made."""
    train, _ = divide(corpora.standard_library("docs"))
    tokenizer = train_bpe((d.text for d in train), SPEC.vocab)
    rows = packing.pack_stream([[*ids, tokenizer.pad_id] for ids in tokenizer.encode_each([d.text for d in train])], ROW)
    model = init_weights(Decoder(SPEC), 0)
    config = LoopConfig("pretrain", seconds=minutes * 60, rows=ROWS, optim=OptimConfig("muon", lr=0.02, adam_lr=0.003),
                        schedule=Schedule("wsd", warmup=0.02, decay=0.4))
    history = Loop(model, rows, config).run()
    save(model, folder, tokenizer=tokenizer)
    told = {"minutes": minutes, "tokens": history.tokens, "epochs": round(history.tokens / rows.tokens.numel(), 2), "steps": history.steps}
    (folder / HISTORY).write_text(json.dumps(told) + "\n", encoding="utf-8")
    return told


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, help="measure this folder instead of training one")
    parser.add_argument("--minutes", type=float, default=12.0, help="of training, where no folder is given")
    parser.add_argument("--corpus", type=Path, help="text to measure on, all of it (default: the held-out part of the standard library)")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the text, at most")
    chosen = parser.parse_args(argv)
    result = begin("quality", chosen)
    folder = chosen.model or FOLDER
    if chosen.model is None:
        trained(folder, chosen.minutes)
    if (folder / HISTORY).exists():
        result["training"] = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    model, tokenizer = load(folder), Tokenizer.load(folder)
    texts = list(corpora.read(chosen.corpus)) if chosen.corpus else divide(corpora.standard_library("docs"))[1]
    rows = rows_of(tokenizer.encode_each([d.text for d in texts]), min(ROW, model.spec.context), chosen.tokens)
    found = quality(model, rows)
    result |= {"model": folder.name, "parameters": count_parameters(model.spec), "tokens": rows.numel(), "goals": GOALS, **found}
    for name, value in found["perplexity"].items():
        more = f"  {found['more'][name]:+.3%} of bfloat16's" + (f", goal {GOALS[name]:.1%}" if name in GOALS else "") if name in found["more"] else ""
        print(f"  {name:9s} perplexity {value:9.4f}{more}")
    return finish(result, chosen.json)


if __name__ == "__main__":
    sys.exit(main())
