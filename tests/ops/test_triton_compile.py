"""The Triton kernels compiled ahead of time, without a GPU: types and layouts, which the interpreter does not see.

Not yet asked of them: no spilled registers. With Triton 3.9 the attention over one-token tiles spills on sm_80 (a stack of 8 bytes in
bfloat16 at 128, 72 in float32 at 64); the figures stand in what COMPILE prints.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")]

COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pellucid.ops.triton import draw, fused, paged
from pellucid.ops.triton.language import tl, wider

tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def build(kernel, constants, target, warps, pointers, floats=()):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "fp32" if n in floats else "i32") for n in names}
    made = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=target, options={"num_warps": warps})
    if target.backend != "cuda":
        return {"code": len(made.asm["hsaco"])}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(made.asm["cubin"]); f.flush()
        text = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\\d+)", text)}
    return found | {"shared": made.metadata.shared, "wgmma": "wgmma" in made.asm["ptx"]}

out, dtype = [], sys.argv[1]
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    index = {n: "*i64" for n in ("into", "slots", "request", "positions", "firsts", "counts")}
    pages = {n: "*" + dtype for n in ("q", "k", "v", "keys", "values")}
    early = target.arch == 90
    for d, G, tokens, window, sinks, raw in ((64, 4, 1, 0, False, False), (128, 2, 1, 0, False, True), (128, 2, 32, 0, False, False),
                                             (128, 8, 8, 128, True, False), (256, 2, 32, 512, False, False), (96, 3, 1, 512, False, True)):
        heads, rows, read, warps = paged.sides(G, d, tokens)
        splits = 4 if tokens == 1 else 1
        constants = {"K": 8, "G": G, "d": d, "D": wider(d), "WINDOW": window, "SINKS": sinks, "HEADS": heads, "ROWS": rows, "KEYS": read,
                     "SPLITS": splits, "PRODUCT": tl.bfloat16 if dtype == "bf16" else tl.float32, "RAW": raw, "NORM": raw, "r": d if raw else 0, "EARLY": early}
        pointers = index | pages | {"sinks": "*fp32", "out": "*fp32" if splits > 1 else "*" + dtype, "norms": "*fp32", "q_weight": "*" + dtype,
                                    "k_weight": "*" + dtype, "frequencies": "*fp32"}
        out.append(["attend", str(target.arch), d, rows, build(paged.attend_kernel, constants, target, warps, pointers, ["scale", "factor", "eps"])])
    out.append(["write", str(target.arch), 128, 1, build(paged.write_kernel, {"K": 8, "d": 128, "D": 128}, target, 1, index | pages)])
    draws = {"logits": "*" + dtype, "temperature": "*fp32", "top_k": "*i64", "top_p": "*fp32", "min_p": "*fp32", "seeds": "*i64", "steps": "*i64",
             "tops": "*fp32", "sums": "*fp32", "firsts": "*i32", "tokens": "*i64", "logprobs": "*fp32"}
    out.append(["draw", str(target.arch), 1, 1, build(draw.draw_kernel, {"BLOCK": 4096, "PARTS": 64, "EARLY": early}, target, 8, draws)])
    out.append(["survey", str(target.arch), 1, 1, build(draw.survey_kernel, {"BLOCK": 4096, "EARLY": early}, target, 8, draws)])
    out.append(["join", str(target.arch), 128, 1, build(paged.join_kernel, {"d": 128, "D": 128, "SPLITS": 16, "EARLY": early}, target, 1,
                                                          {"parts": "*fp32", "norms": "*fp32", "out": "*" + dtype})])
    some = "*" + dtype
    for name, constants, warps, pointers in (
        ("embed", {"BLOCK": 1024, "EARLY": early}, 4, {"tokens": "*i64", "sources": "*i64", "drawn": "*i64", "table": some, "x": "*fp32"}),
        ("add_norm", {"BLOCK": 4096, "ADD": True, "EARLY": early}, 8, {"x": "*fp32", "delta": some, "weight": some, "out": some}),
        ("gate", {"BLOCK": 1024, "EARLY": early}, 4, {"gate_up": some, "out": some}),
        ("heads", {"H": 16, "K": 8, "d": 128, "D": 128, "r": 128, "R": 8, "NORM": True, "EARLY": early}, 4,
         index | pages | {n: some for n in ("qkv", "q_weight", "k_weight", "out")} | {"frequencies": "*fp32"}),
        *(("row_product", {"OUT": rows, "IN": 1024, "NORM": norm, "GATE": gate, "ADD": add, "BIAS": norm, "EARLY": early}, 4,
           {"x": "*fp32" if norm else some, "norm": some, "weight": some, "bias": some, "out": "*fp32" if add else some})
          for rows, norm, gate, add in ((4, True, False, False), (2, False, False, True), (2, True, True, False), (4, False, False, False)))):
        out.append([name, str(target.arch), 0, 0, build(getattr(fused, name + "_kernel"), constants, target, warps, pointers, ["eps", "factor"])])
print(json.dumps(out))
"""


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_for_every_target(dtype):
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PELLUCID_TRITON": "compile"}
    done = subprocess.run([sys.executable, "-c", COMPILE, dtype], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 54
