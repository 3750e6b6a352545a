"""Parts of a model, in threads of one process: together they compute what the whole does, and each reads its slices alone."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace

import pytest
import torch
from tiny_splits import FAMILIES, checkpoint

import pellucid
from pellucid.engine.dp_attention import Exchange
from pellucid.errors import BadInput
from pellucid.models.hub import blank, read_config, spec_of
from pellucid.nn import MLA, MLP, Attn, Decoder, DecoderSpec, Layer, MoE, Rope, init_weights
from pellucid.parallel import ALONE, DecoderPart, Group, Slice, check_groups, check_split, load_part, part_spec
from pellucid.parallel.rounded import SharedInt8Linear
from pellucid.parallel.split import cuts
from pellucid.quant import Int4Linear, Int8Linear, quantize


class Threads(Group):
    """The collectives of a group, for threads."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list):
        super().__init__(rank, size)
        self.barrier, self.slots = barrier, slots

    def gather(self, x):
        self.slots[self.rank] = x.clone()
        self.barrier.wait(30)
        out = torch.stack(self.slots)
        self.barrier.wait(30)
        return out

    def sum(self, x):
        return self.gather(x).sum(0)

    def max(self, x):
        return self.gather(x).amax(0)

    def sum_of_own(self, x):
        return self.sum(x).chunk(self.size)[self.rank]


def together(size: int, work):
    """work(group) in `size` threads; their results."""
    barrier, slots = threading.Barrier(size), [None] * size
    results, errors = [None] * size, []

    def go(rank):
        try:
            with torch.no_grad():
                results[rank] = work(Threads(rank, size, barrier, slots))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=go, args=(rank,)) for rank in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return functools.cache(lambda family: checkpoint(family, tmp_path_factory.mktemp(family) / "model"))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_compute_what_the_whole_computes(family, size, folders):
    folder = folders(family)
    if family == "qwen3-next" and size == 4:
        with pytest.raises(BadInput, match="2 key heads of linear attention cannot be shared out to 4"):
            load_part(folder, Slice(0, 4), ALONE)
        return
    model = pellucid.load(folder)
    whole_bytes = sum(p.nbytes for p in model.parameters())
    tokens = torch.randint(0, 280, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(tokens)

    def work(group):
        part, read = load_part(folder, Slice(group.rank, size), group)
        return part(tokens), part.hidden(tokens), read, sum(p.nbytes for p in part.parameters())

    results = together(size, work)
    for logits, hidden, _, _ in results:
        assert (logits - want).abs().max() <= 1e-5 * want.abs().max()
        assert torch.equal(logits, results[0][0]) and torch.equal(hidden, results[0][1])  # bit by bit the same everywhere
    parameters = sum(p.numel() for p in blank(model.spec).parameters()) * 4
    assert parameters == whole_bytes
    for _, _, read, held in results:
        assert read <= held <= whole_bytes * (0.62 if size == 2 else 0.42)  # GPT-2 has learned positions, which all hold


def test_layers_of_multi_token_prediction_are_cut_as_the_others(folders, tmp_path):
    spec = pellucid.load(folders("deepseek-v3")).spec
    model = init_weights(Decoder(replace(spec, mtp=(spec.layers[-1],))), 0).eval()
    pellucid.save(model, tmp_path / "model")
    tokens, hidden = torch.randint(0, 280, (2, 9), generator=torch.Generator().manual_seed(0)), torch.randn(2, 9, 32)
    with torch.no_grad():
        want = model.predict(1, tokens, hidden)

    def work(group):
        part, _ = load_part(tmp_path / "model", Slice(group.rank, 2), group, mtp=True)
        bare, _ = load_part(tmp_path / "model", Slice(group.rank, 2), group)
        return part.predict(1, tokens, hidden), sum(p.numel() for p in part.mtp.parameters()), len(bare.mtp)

    for found, held, left in together(2, work):
        assert (found - want).abs().max() <= 1e-5 * want.abs().max()
        assert held < 0.75 * sum(p.numel() for p in model.mtp.parameters()) and left == 0


def test_the_parts_of_all_processes_are_the_whole(folders):
    """What is cut is somewhere exactly once: sums of squares of the parts, less those that everybody holds, are the whole's."""
    folder = folders("qwen3")
    model = pellucid.load(folder)
    parts = [load_part(folder, Slice(rank, 2), ALONE)[0] for rank in range(2)]
    for name, p in model.named_parameters():
        mine = [dict(part.named_parameters())[name] for part in parts]
        if mine[0].shape == p.shape:
            assert torch.equal(mine[0], p) and torch.equal(mine[1], p)
        else:
            assert mine[0].numel() + mine[1].numel() == p.numel()
            found, _ = torch.cat([m.flatten() for m in mine]).sort()
            assert torch.equal(found, p.flatten().sort()[0])


def test_only_the_own_slices_of_a_file_are_touched(folders, tmp_path):
    """The other process's rows hold no numbers here: reading them would show."""
    from safetensors.torch import load_file, save_file

    folder = folders("qwen3")
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, t in tensors.items():
        if "q_proj" in name or "gate_proj" in name or "embed_tokens" in name:
            t[len(t) // 2 :] = torch.nan
        if "o_proj" in name or "down_proj" in name:
            t[:, t.shape[1] // 2 :] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    part, read = load_part(tmp_path, Slice(0, 2), ALONE)
    assert all(p.isfinite().all() for p in part.parameters())
    assert read == sum(p.nbytes for p in part.parameters())
    broken, _ = load_part(tmp_path, Slice(1, 2), ALONE)
    assert not all(p.isfinite().all() for p in broken.parameters())


# --- quantized parts ------------------------------------------------------------------------------------------------------


def codes_of(m) -> torch.Tensor:
    """What the kernel holds, as numbers: of 4 bits less 8."""
    return m.codes.float() if isinstance(m, Int8Linear) else m.kernel.unpack(m.packed)[0].float() - 8


@pytest.mark.parametrize(("family", "size", "bits"), [
    *[(family, 2, 8) for family in ("llama", "qwen3-moe", "deepseek-v3", "gpt-oss", "gpt2", "qwen3-next", "llama-one-kv")],
    ("llama", 4, 8), ("qwen3-wide", 2, 4), ("qwen3-wide", 4, 4)])
def test_quantized_parts_hold_the_quantized_whole(family, size, bits, folders):
    """The same codes and scales, cut; and the same results, but for activations that fall on another side of a rounding."""
    folder = folders(family)
    model = quantize(pellucid.load(folder), bits=bits)
    tokens = torch.randint(0, 280, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(tokens)
    with torch.device("meta"):
        found = dict(cuts(blank(model.spec), DecoderPart(model.spec, Slice(1, size), ALONE), Slice(1, size)))

    def work(group):
        part, _ = load_part(folder, Slice(group.rank, size), group, bits=bits)
        return part(tokens), part

    results = together(size, work)
    for logits, _ in results:
        assert torch.equal(logits, results[0][0])
        assert (logits - want).abs().max() <= 2e-3 * want.abs().max()
    whole, part, compared = dict(model.named_modules()), results[1][1], 0
    for name, m in part.named_modules():
        cut = found.get(f"{name}.weight")
        if isinstance(m, (Int8Linear, Int4Linear)) and cut is not None and not cut.empty:
            theirs, ours = codes_of(whole[name]), codes_of(m)
            if cut.rows is not None:
                theirs = torch.cat([theirs[a:b] for a, b in cut.rows])
            if cut.columns is not None:
                theirs = theirs[:, cut.columns[0] : cut.columns[1]]
                assert type(m) is (SharedInt8Linear if bits == 8 else Int4Linear)
                if bits == 8:
                    assert torch.equal(m.scale, whole[name].scale)
            assert torch.equal(ours[: len(theirs)], theirs)  # a head may be filled up
            compared += 1
    assert compared >= 4 * len(model.spec.layers) - 3
    mine = model.embed.weight[len(part.embed.weight) :][: len(part.embed.weight)]
    assert torch.equal(part.embed.weight[: len(mine)], mine)


def test_a_quantized_folder_is_cut_as_it_stands(folders, tmp_path):
    from pellucid.quant import compress

    for bits, family in ((8, "llama"), (4, "qwen3-wide")):
        compress(folders(family), tmp_path / str(bits), bits)

        def work(group, bits=bits, family=family):
            ours, theirs = (load_part(f, Slice(group.rank, 2), group, bits=bits)[0] for f in (tmp_path / str(bits), folders(family)))
            return ours(torch.arange(50)[None]), theirs(torch.arange(50)[None])

        for ours, theirs in together(2, work):
            assert torch.equal(ours, theirs)


def test_a_cut_through_a_group_of_int4_weights_is_refused(folders):
    with pytest.raises(BadInput, match=r"(?s)INT4 weights cannot be cut over 2 processes.*mixer.o has 32 columns"):
        load_part(folders("llama"), Slice(0, 2), ALONE, bits=4)
    with pytest.raises(BadInput, match="INT4") as refused:
        check_groups(blank(spec_of(read_config(folders("qwen3-wide")))), Slice(0, 8))
    assert "use 1, 2 or 4 processes, or INT8" in refused.value.next
    check_groups(blank(spec_of(read_config(folders("llama")))), Slice(0, 2, mixers=1))


# --- data-parallel attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(5, 5, 5), (6, 1, 0), (0, 40, 1), (0, 0, 3), (7, 6, 5)])
@pytest.mark.parametrize("family", ["deepseek-v3", "qwen3-moe", "qwen2-moe", "llama"])
def test_processes_with_own_tokens_share_feed_forwards(family, counts, folders):
    """Uneven counts, idle processes, both ways of bringing rows; each gets what the whole model gives for its tokens."""
    folder, size = folders(family), 3
    if family == "llama":
        counts, size = counts[:2], 2
    model = pellucid.load(folder)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 280, (1, n), generator=generator) for n in counts]

    if family in ("qwen3-moe", "qwen2-moe", "deepseek-v3") and size == 3:
        with pytest.raises(BadInput, match="cannot be shared out to 3"):
            check_split(spec_of(read_config(folder)), 3, mixers=1)
        counts, tokens, size = (*counts, 2), [*tokens, torch.randint(0, 280, (1, 2), generator=generator)], 4

    def work(group):
        part, _ = load_part(folder, Slice(group.rank, size, mixers=1), group)
        exchange = Exchange(part, group)
        total = exchange.meet(counts[group.rank])
        if not counts[group.rank]:
            exchange.idle(part.layers)
            return exchange.even, total, None
        return exchange.even, total, part(tokens[group.rank])

    for rank, (even, total, logits) in enumerate(together(size, work)):
        assert total == sum(counts) and even == (2 * sum(counts) >= size * max(counts))
        if counts[rank]:
            with torch.no_grad():
                want = model(tokens[rank])
            assert (logits - want).abs().max() <= 1e-5 * want.abs().max()


# --- what cannot be cut -----------------------------------------------------------------------------------------------------


def spec(mixer, ffn) -> DecoderSpec:
    return DecoderSpec(100, 48, (Layer(mixer, ffn),))


@pytest.mark.parametrize(("model", "size", "told"), [
    (spec(Attn(6, 6, 8, Rope(8)), MLP(64)), 4, "6 attention heads"),
    (spec(Attn(12, 3, 8, Rope(8)), MLP(64)), 2, "3 key/value heads"),
    (spec(Attn(4, 4, 8, Rope(8)), MLP(65)), 2, "65 channels"),
    (spec(MLA(6, None, 16, 8, 8, Rope(8)), MLP(64)), 4, "6 attention heads"),
    (spec(Attn(4, 4, 8, Rope(8)), MoE(2, 1, 16)), 4, "2 experts"),
    (spec(Attn(4, 4, 8, Rope(8)), MoE(8, 1, 16, shared=6)), 4, "6 channels of the shared expert"),
])
def test_what_cannot_be_cut_is_refused_with_the_numbers_that_work(model, size, told):
    with pytest.raises(BadInput, match=told) as refused:
        check_split(model, size)
    assert "use" in refused.value.next


def test_fewer_kv_heads_than_processes_are_held_by_several():
    whole = spec(Attn(8, 2, 4, Rope(4)), MLP(64))
    assert [part_spec(whole, Slice(r, 4)).layers[0].mixer.kv_heads for r in range(4)] == [1] * 4
    assert part_spec(whole, Slice(1, 4)).layers[0].mixer.heads == 2
