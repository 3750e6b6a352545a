"""MXFP4 against the decoder of transformers, and by hand."""

import pytest
import torch
from torch import tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pellucid.ops.mxfp4 import mxfp4_decode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_decoder_of_transformers(dtype):
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 10, 4), generator=g, dtype=torch.uint8)
    got = mxfp4_decode(blocks, scales, dtype)
    want = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # with its last two dimensions exchanged
    assert got.dtype == dtype and got.shape == (3, 10, 128)
    assert torch.equal(got.mT, want)


def test_by_hand():
    """0x2F: the low half comes first, 15 is -6, 2 is 1."""
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0], blocks[0, 0, 15] = 0x2F, 0x70
    got = mxfp4_decode(blocks, tensor([[128]], dtype=torch.uint8))
    assert got[0, :2].tolist() == [-12.0, 2.0] and got[0, -2:].tolist() == [0.0, 12.0] and got[0, 2:-2].eq(0).all()
    assert mxfp4_decode(blocks, tensor([[255]], dtype=torch.uint8)).isnan().all()
    assert mxfp4_decode(blocks, tensor([[0]], dtype=torch.uint8))[0, 1] == 2.0**-127


@pytest.mark.parametrize(("blocks", "scales"), [((2, 3, 16), (2, 4)), ((2, 3, 8), (2, 3))])
def test_shapes_that_do_not_fit_are_refused(blocks, scales):
    with pytest.raises(ValueError, match="do not fit"):
        mxfp4_decode(torch.zeros(blocks, dtype=torch.uint8), torch.zeros(scales, dtype=torch.uint8))
