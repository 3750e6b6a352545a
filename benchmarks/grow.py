"""The main job over several seeds: what it must show, seed by seed.

    pellucid bench grow --seeds 5 --out benchmarks/results/grow.json

Each seed is a run of `pellucid grow --json` in a process of its own. Checked for each: bits per byte under the
baselines, accuracy 0 before SFT, its gain by GRPO, format and length after GRPO, the cost of INT8, minutes spent, and
that transformers opens the folder with equal logits and equal greedy text. The last line of stdout is the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--json", type=Path, help="keep the result here")
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            report = run(Path(folder) / f"seed-{seed}", seed, options.minutes)
            rows.append(row_of(report) | {"seed": seed} | transformers_agree(Path(folder) / f"seed-{seed}" / "model"))
            print(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()), flush=True)
            result = {"benchmark": "grow", "minutes": options.minutes, "machine": report["machine"], "created": report["created"],
                      "seeds": rows, "worst": worst(rows)}
            if options.json:  # after every seed: an interrupted benchmark keeps what it measured
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


def run(folder: Path, seed: int, minutes: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "pellucid", "grow", "--json", "--out", str(folder), "--seed", str(seed),
               "--minutes", f"{minutes:g}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"seed {seed} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the main job promises, as numbers."""
    stage = {s["stage"]: s for s in report["stages"]}
    scores = report["evaluation"]
    return {
        "bits_per_byte": stage["pretrain"]["after"], "best_baseline": min(report["baselines"].values()),
        "before_sft": stage["sft"]["before"], "after_sft": scores["sft"]["pass@1"], "after_grpo": scores["grpo"]["pass@1"],
        "gain_points": 100 * (scores["grpo"]["pass@1"] - scores["sft"]["pass@1"]),
        "sampled_after_sft": scores["sft"].get("sampled pass@1"), "sampled_after_grpo": scores["grpo"].get("sampled pass@1"),
        "format_sft": scores["sft"]["format"], "format_grpo": scores["grpo"]["format"],
        "length_sft": scores["sft"]["mean_length"], "length_grpo": scores["grpo"]["mean_length"],
        "truncated_grpo": scores["grpo"]["truncated"], "int8": scores["int8"]["pass@1"],
        "int8_points": 100 * (scores["int8"]["pass@1"] - scores["grpo"]["pass@1"]),
        "tools_solved": stage["tools"]["after"], "minutes": report["minutes_spent"],
    }


def worst(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "gain_points": min(r["gain_points"] for r in rows), "format_grpo": min(r["format_grpo"] for r in rows),
        "int8_points": min(r["int8_points"] for r in rows), "minutes": max(r["minutes"] for r in rows),
        "bits_per_byte_under_baseline": min(r["best_baseline"] - r["bits_per_byte"] for r in rows),
    }


def transformers_agree(folder: Path) -> dict[str, Any]:
    """Logits and greedy text of the grown folder, opened by transformers and by pellucid."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pellucid

    theirs, ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), pellucid.load(folder)
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    llm = pellucid.LLM(folder)
    messages = [{"role": "user", "content": "Sort 52,7,31,88."}]
    ids = llm.chat_ids(messages)
    their_ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        gap = float((theirs(tokens).logits - ours(tokens)).abs().max())
    greedy = theirs.generate(tokens, max_new_tokens=60, do_sample=False)[0, len(ids):].tolist()
    mine = llm.generate([ids], pellucid.SamplingParams(max_tokens=60))[0].outputs[0].token_ids
    return {"logit_gap": gap, "same_ids": list(their_ids) == ids, "same_greedy": greedy[: len(mine)] == mine}


if __name__ == "__main__":
    sys.exit(main())
