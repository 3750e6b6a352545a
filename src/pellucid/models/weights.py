"""The safetensors files of a folder as one mapping from tensor name to (lazily read) tensor.

Files are mapped, not read: a tensor costs memory only while it is copied, and a slice of it only as much as it is.
Nothing is unpickled; an index that points outside of the folder, a file cut short or a lying shape is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pellucid import events
from pellucid.errors import BadInput
from pellucid.models.families import Family
from pellucid.models.names import Piece, targets
from pellucid.ops.int4 import int4_decode, int4_unpack
from pellucid.ops.mxfp4 import mxfp4_decode
from pellucid.runtime import forget_pages

IGNORED = (r"rotary_emb\.inv_freq$", r"\.position_ids$", r"\.attn\.bias$", r"\.masked_bias$")  # buffers in old files
SPARE_HEADS = ("lm_head.weight",)  # may stand in a file whose head is the embedding
ABSURD = 250_000  # tensors; the largest models of today have a third of it
MAPPED_FROM = 2**28  # bytes of a checkpoint. Mapped tensors begin anywhere within a cache line: a 15th more time for a token of 30 million parameters
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Weights:
    """Names are the Hub's, in the spelling of the family's table: `Family.renames` and a missing base prefix are mended."""

    def __init__(self, folder: Path, stack: ExitStack, family: Family):
        self.folder, self.family, self.stack = folder, family, stack
        self.where: dict[str, tuple[Path, str]] = {}  # name -> the file, the name in it
        self.open: dict[Path, Any] = {}
        stack.callback(self.open.clear)
        for path in weight_files(folder):
            self.where.update({name: (path, name) for name in self._handle(path).keys()})
        self._mend_names()

    def _mend_names(self) -> None:
        for pattern, replacement in self.family.renames:
            self.where = {re.sub(pattern, replacement, name): at for name, at in self.where.items()}
        prefix = self.family.prefix
        outside = {bare for bare in self._table_starts() if bare != prefix}
        if not any(name.startswith(prefix) for name in self.where):
            self.where = {name if name.startswith(tuple(outside)) else prefix + name: at for name, at in self.where.items()}

    def _table_starts(self) -> set[str]:
        """The first words of all names in the family's table."""
        entries = self.family.names.values()
        flat = [name for entry in entries for choice in (entry if isinstance(entry, list) else [entry]) for name in choice]
        return {name.split(".")[0] + "." for name in flat}

    def _handle(self, path: Path) -> Any:
        if path not in self.open:
            try:
                self.open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise BadInput(f"{path.name} is not a whole safetensors file", str(error), "fetch the file again") from error
        return self.open[path]

    def __contains__(self, name: object) -> bool:
        return name in self.where or f"{name}_blocks" in self.where

    def stored(self, name: str) -> Tensor:
        """The tensor as it stands in the file."""
        path, stored = self.where[name]
        tensor: Tensor = self._handle(path).get_tensor(stored)
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor that is neither codes nor of another kind."""
        kinds = (self._handle(path).get_slice(stored).get_dtype() for path, stored in self.where.values())
        return next((DTYPES[kind] for kind in kinds if kind in DTYPES), torch.float32)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor; only these are read."""
        path, stored = self.where[name]
        part: Tensor = self._handle(path).get_slice(stored)[start:stop]
        return part

    def stored_shape(self, name: str) -> tuple[int, ...]:
        path, stored = self.where[name]
        return tuple(self._handle(path).get_slice(stored).get_shape())

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor that `get` returns."""
        if name not in self.where and f"{name}_blocks" in self.where:
            *lead, rows, groups, half = self.stored_shape(f"{name}_blocks")
            return (*lead, 2 * groups * half, rows)
        found = self.stored_shape(name)
        return (*found[:-1], 2 * found[-1]) if self._is_int4(name) else found

    def _is_int4(self, name: str) -> bool:
        """Two codes to a byte (see ops/int4.py)."""
        path, stored = self.where[name]
        part = self._handle(path).get_slice(stored)
        return f"{name}_scale" in self.where and part.get_dtype() == "U8"

    def companions(self, name: str) -> set[str]:
        """Tensors that belong to this one: its scales, or codes and scales."""
        return {f"{name}_{part}" for part in ("scale", "scale_inv", "blocks", "scales")}

    def get(self, name: str) -> Tensor:
        """The tensor; codes that stand beside their scales are multiplied by them."""
        if name not in self.where:
            return self._blocks(name)
        tensor = self.stored(name)
        if f"{name}_scale_inv" in self.where:
            return self._tiles(name, tensor)
        if tensor.is_floating_point() and f"{name}_scale" not in self.where:
            return tensor
        return self._groups_scaled(name, tensor) if self._is_int4(name) else self._rows_scaled(name, tensor)

    def _groups_scaled(self, name: str, packed: Tensor) -> Tensor:
        """INT4 codes with one scale for each group of a row (see quant/)."""
        scale, (*rows, half) = self.stored(f"{name}_scale"), packed.shape
        if list(scale.shape[:-1]) != rows or scale.dim() < 2 or not scale.shape[-1] or 2 * half % scale.shape[-1] or not scale.is_floating_point():
            raise BadInput(f"{name}_scale is {tuple(scale.shape)} for {tuple(rows)} rows of {2 * half} codes",
                           "there should be a scale for each group of a row", "quantize the checkpoint again")
        return int4_decode(int4_unpack(packed), scale)

    def _rows_scaled(self, name: str, codes: Tensor) -> Tensor:
        """INT8 codes with one scale a row, or a column where the file holds the matrix transposed (see quant/)."""
        scale, (*lead, rows, columns) = f"{name}_scale", (*codes.shape,)
        found = self.stored_shape(scale) if scale in self.where else None
        if found not in ((*lead, rows, 1), (*lead, 1, columns)):
            raise BadInput(f"{name} holds {codes.dtype} codes, and {scale} is {found or 'missing'}",
                           f"there should be a scale for each row: {(*lead, rows, 1)}", "quantize the checkpoint again")
        return codes.float() * self.stored(scale)

    def _tiles(self, name: str, codes: Tensor, side: int = 128) -> Tensor:
        """FP8 codes with one scale for each tile of 128 x 128 (DeepSeek-V3); tiles at the edges may be cut."""
        scale = f"{name}_scale_inv"
        must = tuple(-(-n // side) for n in codes.shape)
        if codes.dim() != 2 or self.stored_shape(scale) != must:
            raise BadInput(f"{scale} is {self.stored_shape(scale)} for codes of {tuple(codes.shape)}",
                           f"there should be a scale for each tile of {side} x {side}: {must}", "fetch the checkpoint again")
        scales = self.stored(scale).float().repeat_interleave(side, 0)[: codes.shape[0]]
        return codes.float().mul_(scales.repeat_interleave(side, 1)[:, : codes.shape[1]])

    def _blocks(self, name: str) -> Tensor:
        """MXFP4 (gpt-oss's experts): codes (..., rows, G, 16) whose matrix the file's own layout holds transposed."""
        blocks, scales = self.stored(f"{name}_blocks"), f"{name}_scales"
        if scales not in self.where or self.stored_shape(scales) != tuple(blocks.shape[:-1]) or blocks.shape[-1:] != (16,):
            raise BadInput(f"{name}_blocks is {tuple(blocks.shape)}, and {scales} is {self.stored_shape(scales) if scales in self.where else 'missing'}",
                           "there should be 16 bytes and one scale for each 32 numbers", "fetch the checkpoint again")
        return mxfp4_decode(blocks, self.stored(scales)).mT

    # --- a model's parameters -------------------------------------------------------------------------------------------

    def hold(self, model: nn.Module, prefix: str, layers: int) -> bool:
        """Whether any tensor fills one of the model's parameters whose names start so."""
        return any(piece.name in self for _, _, piece in targets(model, self.family.names, layers, self, prefix))

    def check(self, model: nn.Module, layers: int, allow_missing: bool = False) -> None:
        """BadInput that names every tensor that is missing, unused or of another shape. Reads headers only.

        allow_missing: missing and unused ones are only told; a wrong shape is always refused.
        """
        missing: dict[str, None] = {}
        wrong, used = [], set()
        for _, _, piece in targets(model, self.family.names, layers, self):
            if piece.name not in self:
                missing[piece.name] = None
                if len(missing) > ABSURD:
                    raise BadInput(f"config.json describes a model of over {ABSURD:,} tensors that {self.folder} lacks", f"{piece.name} is one",
                                   "check that config.json and the safetensors belong together")
            elif piece.name not in used:
                used |= {piece.name, *self.companions(piece.name)}
                if (found := self.shape(piece.name)) != piece.shape:
                    wrong.append(f"{piece.name} {found} instead of {piece.shape}")
        spare = SPARE_HEADS if getattr(model.spec, "tied", False) else ()
        ignored = re.compile("|".join((*IGNORED, *self.family.ignored)))
        unused = [n for n in self.where if n not in used and n not in spare and not ignored.search(n)]
        lists = (("missing", list(missing)), ("unused", unused), ("wrong shape", wrong))
        problems = [f"{label}: {', '.join(sorted(names)[:8])}{' ...' if len(names) > 8 else ''} ({len(names)})"
                    for label, names in lists if names]
        if problems and (wrong or not allow_missing):
            raise BadInput(f"the weights in {self.folder} do not fit its config.json", "; ".join(problems),
                           "check that config.json and the safetensors belong together"
                           + ("" if wrong else ", or go on with --allow-missing: what is missing is drawn at random then"))
        if problems:
            events.note(f"{self.folder}: {'; '.join(problems)}; missing weights are random", "warning")

    @torch.no_grad()
    def fill(self, model: nn.Module, layers: int, adopt: bool = True) -> None:
        """Every parameter pulls its pieces. What the file lacks stays as it is. adopt=False: parameters stay the objects
        that they are (an optimizer holds them), and only their values change.

        A tensor of a large checkpoint that is a whole parameter as it stands becomes the parameter: the file's mapped pages, private
        to this process (writing copies them), take the place of memory that was never touched. The others are copied, on
        several threads (copying is waiting for pages), and their pages given back.
        """
        with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
            copies: list[Future[None]] = []
            for name, parameter, piece in list(targets(model, self.family.names, layers, self)):
                if piece.name not in self:
                    continue
                if adopt and self._adoptable(name, parameter, piece):
                    owner, _, leaf = name.rpartition(".")
                    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(self.stored(piece.name), parameter.requires_grad)
                else:
                    copies.append(pool.submit(self._copy, piece, piece.ours(parameter)))
            for copy in copies:
                copy.result()

    def _adoptable(self, name: str, parameter: Tensor, piece: Piece) -> bool:
        path, stored = self.where.get(piece.name, (None, ""))
        return (path is not None and self._size >= MAPPED_FROM and parameter.device.type == "cpu" and piece.whole(parameter)
                and not any(scales in self.where for scales in self.companions(piece.name))
                and DTYPES.get(self._handle(path).get_slice(stored).get_dtype()) == parameter.dtype)

    @cached_property
    def _size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in {path for path, _ in self.where.values()})

    @torch.no_grad()
    def _copy(self, piece: Piece, into: Tensor) -> None:
        tensor = self.get(piece.name)
        into.copy_(piece.theirs(tensor))
        if piece.name in self.where and piece.within is None:  # pages of a tensor with several pieces are needed again
            forget_pages(tensor.data_ptr(), tensor.nbytes)


def weight_files(folder: Path) -> list[Path]:
    """The single file if there is one (others beside it are not this model's), else the index's, else all."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise BadInput(f"{folder} holds no *.safetensors", "only safetensors weights are read (pickle runs code)",
                           "convert the checkpoint with transformers: model.save_pretrained(folder)")
        return files
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index} is not a readable weight index", repr(error), "fetch the file again") from error
    present = {path.name for path in folder.glob("*.safetensors")}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index.name} names {name!r}", "that is no safetensors file of this folder",
                           "do not trust this checkpoint")
        if name not in present:
            raise BadInput(f"shard {name:.80} is missing", f"{index.name} lists it", "fetch the checkpoint again")
    return [folder / name for name in sorted(names)]


def stored_dtypes(folder: Path) -> dict[str, int]:
    """Format -> numbers stored in it, from the headers of the folder's files; empty where there are no weights."""
    found: dict[str, int] = {}
    for path in weight_files(folder) if any(folder.glob("*.safetensors")) else []:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    found[part.get_dtype()] = found.get(part.get_dtype(), 0) + math.prod(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path.name} is not a whole safetensors file", str(error), "fetch the file again") from error
    return found


def planned(model: nn.Module, family: Family, layers: int) -> dict[str, list[tuple[Tensor, Piece]]]:
    """Hub name -> the parameters and pieces that make it up, in the order of the model."""
    plan: dict[str, list[tuple[Tensor, Piece]]] = {}
    for _, parameter, piece in targets(model, family.names, layers):
        plan.setdefault(piece.name, []).append((parameter.detach(), piece))
    return plan


def assemble(parts: list[tuple[Tensor, Piece]]) -> Tensor:
    """One Hub tensor, in memory of its own (safetensors refuses views that share storage)."""
    first, piece = parts[0]
    tensor = torch.empty(piece.shape, dtype=first.dtype)
    for parameter, part in parts:
        part.theirs(tensor).copy_(part.ours(parameter))
    return tensor
