"""Training and encoding of byte-level BPE beside Hugging Face `tokenizers`, in one process.

    pellucid bench tokenizer --out benchmarks/results/tokenizer.json

The text is the source of the installed Python's standard library, so every machine has it. Both train the same kind
of tokenizer (same cut, same vocabulary size), and both encode with the same file, ids compared one by one. Rounds are
interleaved and the fastest of each is kept. Rates are millions of UTF-8 bytes a second. `--threads 1` compares one
thread with one. The last line of stdout is the result.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=8192, help="size of the vocabulary")
    parser.add_argument("--megabytes", type=float, help="train on so much text (default: all of it)")
    parser.add_argument("--encode-megabytes", type=float, default=8.0, help="encode so much of it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="keep all of them to so many cores (default: all cores)")
    parser.add_argument("--json", type=Path, help="keep the result here")
    options = parser.parse_args(argv)
    threads = keep_to(options.threads)

    texts = standard_library(options.megabytes)
    print(f"{megabytes(texts):.1f} MB in {len(texts)} files, {threads} threads")
    training, tokenizer = compare_training(texts, options.vocab, options.rounds)
    encoding = compare_encoding(tokenizer, up_to(texts, options.encode_megabytes), options.rounds)
    older = compare_older_files(tokenizer, up_to(texts, options.encode_megabytes / 4), options.rounds)
    result = {"benchmark": "tokenizer", "vocab_size": options.vocab, "threads": threads, "machine": machine(),
              "created": time.strftime("%Y-%m-%d"), "training": training, "encoding": encoding,
              "older_files": older}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, separators=(",", ":")))
    return 0


def keep_to(asked: int | None) -> int:
    """Threads for every library, pellucid included: before any of them starts one."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    threads = min(asked or len(usable), len(usable))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, usable[:threads])
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": str(threads > 1).lower()}
    return threads


def standard_library(limit: float | None) -> list[str]:
    """The .py files of the standard library, without installed packages."""
    import sysconfig

    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return texts if limit is None else up_to(texts, limit)


def up_to(texts: list[str], limit: float) -> list[str]:
    """Every n-th text, so that about `limit` MB are spread over all of them."""
    step = max(1, round(megabytes(texts) / limit))
    return texts[::step]


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def fastest(rounds: int, calls: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds and results of each call: the shortest of `rounds`, taken in turn so that a busy machine hits all."""
    seconds: dict[str, float] = {}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            results[name] = None  # free the last result before measuring
            start = time.perf_counter()
            results[name] = call()
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    return seconds, results


def compare_training(texts: list[str], size: int, rounds: int) -> tuple[dict[str, Any], Any]:
    from pellucid.tokenizers import train_bpe

    seconds, results = fastest(rounds, {"pellucid": lambda: train_bpe(texts, size),
                                        "tokenizers": lambda: train_with_tokenizers(texts, size)})
    ours, theirs = results["pellucid"], results["tokenizers"]
    sample = up_to(texts, 1.0)
    counts = {"pellucid": sum(map(len, ours.encode_each(sample))),
              "tokenizers": sum(len(found.ids) for found in theirs.encode_batch_fast(sample))}
    ratio = seconds["tokenizers"] / seconds["pellucid"]
    print(f"training: pellucid {seconds['pellucid']:.1f} s, tokenizers {seconds['tokenizers']:.1f} s: "
          f"{ratio:.1f} times as fast")
    return {"megabytes": megabytes(texts), "seconds": seconds, "times_tokenizers": ratio,
            "bytes_per_token": {name: megabytes(sample) * 1e6 / count for name, count in counts.items()}}, ours


def train_with_tokenizers(texts: list[str], size: int) -> Any:
    """The same kind of tokenizer by Hugging Face's trainer."""
    from pellucid.tokenizers import PELLUCID_PATTERN
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PELLUCID_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def compare_encoding(ours: Any, texts: list[str], rounds: int) -> dict[str, Any]:
    """One text after the other, then as a batch; tiktoken alone stands beside as the speed that is possible."""
    import tiktoken

    from pellucid.tokenizers import PELLUCID_PATTERN
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(json.dumps(ours.source.data))
    theirs.encode_special_tokens = True
    ranks = {ours.token_bytes(i): i for i in range(ours.vocab_size - len(ours.added))}
    alone = tiktoken.Encoding("alone", pat_str=PELLUCID_PATTERN, mergeable_ranks=ranks, special_tokens={})
    seconds, results = fastest(rounds, {
        "pellucid encode": lambda: [ours.encode(text) for text in texts],
        "tiktoken encode_ordinary": lambda: [alone.encode_ordinary(text) for text in texts],
        "tokenizers encode": lambda: [found.ids for found in map(theirs.encode, texts)],
        "pellucid encode_each": lambda: ours.encode_each(texts),
        "tokenizers encode_batch_fast": lambda: [found.ids for found in theirs.encode_batch_fast(texts)]})
    first = results["pellucid encode"]
    same = {name: ids == first for name, ids in results.items() if not name.startswith("tiktoken")}
    if not all(same.values()):
        raise SystemExit(f"ids differ: {same}")
    size = megabytes(texts)
    rates = {name: size / spent for name, spent in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:30s} {rate:7.2f} MB/s")
    return {"megabytes": size, "megabytes_per_second": rates, "ids_equal": True,
            "times_tokenizers": rates["pellucid encode"] / rates["tokenizers encode"],
            "times_tokenizers_batch": rates["pellucid encode_each"] / rates["tokenizers encode_batch_fast"],
            "times_tiktoken": rates["pellucid encode"] / rates["tiktoken encode_ordinary"]}


def compare_older_files(trained: Any, texts: list[str], rounds: int) -> dict[str, Any]:
    """The same words as the files before tokenizer.json: read by pellucid, and encoded as fast as from that one."""
    import base64
    import tempfile

    from pellucid.tokenizers import Tokenizer
    from tokenizers import Tokenizer as Library

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs, ranks = Path(folder) / "pairs", Path(folder) / "ranks"
        pairs.mkdir()
        ranks.mkdir()
        model = trained.source.data["model"]
        vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
        (pairs / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (pairs / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])), encoding="utf-8")
        (pairs / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}', encoding="utf-8")
        tokens = (trained.token_bytes(i) for i in range(len(model["vocab"])))
        (ranks / "qwen.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
        for name, place in (("vocab.json and merges.txt", pairs), ("qwen.tiktoken", ranks)):
            ours = Tokenizer.load(place)
            theirs = Library.from_str(json.dumps(ours.source.data))
            theirs.encode_special_tokens = True
            seconds, ids = fastest(rounds, {"pellucid": lambda: [ours.encode(text) for text in texts],  # noqa: B023
                                            "tokenizers": lambda: [theirs.encode(text).ids for text in texts]})  # noqa: B023
            if ids["pellucid"] != ids["tokenizers"]:
                raise SystemExit(f"ids differ: {name}")
            ratio = seconds["tokenizers"] / seconds["pellucid"]
            results[name] = {"times_tokenizers": ratio, "ids_equal": True, "engine": ours.backend.split()[0]}
            print(f"{name:30s} {ratio:7.2f} times as fast as tokenizers ({results[name]['engine']})")
    return results


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    from pellucid.runtime import machine_card

    return machine_card() | {name: version(name) for name in ("rustbpe", "tiktoken", "tokenizers")}


if __name__ == "__main__":
    raise SystemExit(main())
