"""The benchmark runs, and its last line is its result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "tokenizer.py"


def test_small_run(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--megabytes", "0.3", "--encode-megabytes", "0.1", "--vocab", "3000",
               "--rounds", "1", "--json", str(tmp_path / "kept" / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "kept" / "result.json").read_text())
    assert result["encoding"]["ids_equal"] and result["training"]["times_tokenizers"] > 0
    assert all(found["ids_equal"] and found["engine"] == "tiktoken" for found in result["older_files"].values())
    counts = result["training"]["bytes_per_token"]
    assert abs(counts["pellucid"] / counts["tokenizers"] - 1) < 0.05  # the same kind of tokenizer was trained
