"""The kernel of all layers without a GPU: who makes which rows, and that NVRTC compiles it, where that is installed (PyTorch's CUDA builds
bring it; `pip install nvidia-cuda-nvrtc` does too). What it computes: tests/gpu/test_whole.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pellucid.ops.cuda import compile, whole

SMALL = whole.Sizes(1024, 3072, 16, 8, 128, 128, True)
LARGER = whole.Sizes(2048, 6144, 16, 8, 128, 128, True)
NARROW = whole.Sizes(1024, 1024, 8, 4, 64, 32, False)
UNEVEN = whole.Sizes(896, 4864, 14, 2, 64, 64, False)
LARGE = whole.Sizes(4096, 12288, 32, 8, 128, 128, True)


@pytest.mark.parametrize("sizes", [SMALL, LARGER, NARROW])
@pytest.mark.parametrize("processors", [128, 132, 144])
def test_every_program_makes_the_same_number_of_rows(sizes, processors):
    plan = whole.plan_for(sizes, processors)
    assert plan is not None and processors // 2 <= plan.programs <= processors
    for rows, (all_rows, columns) in zip(plan.rows, sizes.products(), strict=True):
        assert rows * plan.programs == all_rows and rows % 8 == 0
        each = whole.rows_of_slot(columns)
        assert each * (2 * columns + 64) <= whole.SLOT and 8 % each == 0
    assert plan.parts * sizes.kv_heads <= plan.programs and plan.slots >= 8
    assert plan.shared + plan.arrays <= whole.SHARED


def test_what_cannot_be_shared_evenly_has_no_plan():
    assert whole.plan_for(UNEVEN, 132) is None and whole.plan_for(LARGE, 132) is None and whole.plan_for(SMALL, 64) is not None and whole.plan_for(LARGER, 60) is None
    assert whole.plan_for(SMALL, 7) is None


def test_other_devices_are_told_why():
    choice = whole.choose_plan(SMALL, torch.device("cpu"))
    assert choice.value is None and "Hopper" in choice.reason


def test_the_source_knows_as_many_fields_as_are_given():
    source = Path(whole.__file__).with_suffix(".cu").read_text(encoding="utf-8")
    fields = re.search(r"struct Layer \{[^\n]*\n(.*?)\};", source, re.S)
    assert fields is not None and len(re.findall(r"[,;]", fields[1])) == whole.FIELDS


@pytest.mark.slow
@pytest.mark.skipif(compile.nvrtc() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("sizes", [SMALL, LARGER, NARROW])
def test_it_compiles(sizes):
    plan = whole.plan_for(sizes, 132)
    assert plan is not None
    assert len(whole.code_of(plan, 1000)) > 10_000
    with pytest.raises(RuntimeError, match="NVRTC"):
        compile.compiled("no kernel", ["-arch=sm_90"])
