"""Messages between processes: a header of JSON and raw tensors behind it, over a connected stream socket.

    8 bytes   length of the header, most significant byte first
    header    UTF-8 JSON: {"body": {...}, "tensors": [["F32", [2, 3]], ...]}; dtypes are named as in safetensors
    tensors   the numbers of each, row by row, in the byte order of the machine, nothing in between

What arrives is data and never code. Lengths, dtypes and shapes are checked against the limits before any memory is taken.
"""

from __future__ import annotations

import contextlib
import json
import math
import select
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pellucid.errors import PellucidError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
          "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 1 << 28
MOST_BYTES = 1 << 38


class Gone(PellucidError):
    """The other side has closed the connection, or died."""


class Garbled(PellucidError):
    """What arrived is no message."""


class Channel:
    """One end of a connection. Several threads may send; one receives.  most_header, most_bytes: of what is accepted."""

    def __init__(self, sock: socket.socket, most_header: int = MOST_HEADER, most_bytes: int = MOST_BYTES):
        self.sock, self.most_header, self.most_bytes = sock, most_header, most_bytes
        self._sending = threading.Lock()

    def send(self, body: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Returns when all is handed to the system. Raises Gone."""
        kept = [t.detach().to("cpu").contiguous() for t in tensors]
        header = json.dumps({"body": body, "tensors": [[NAMES[t.dtype], list(t.shape)] for t in kept]}, separators=(",", ":")).encode()
        try:
            with self._sending:
                self.sock.sendall(len(header).to_bytes(8, "big") + header)
                for t in kept:
                    if t.numel():
                        self.sock.sendall(as_bytes(t))
        except OSError as error:
            raise Gone("the other process is gone", str(error)) from error

    def receive(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Waits for a message. Raises Gone at the end of the stream, Garbled for what is no message (the stream is of no use then)."""
        size = int.from_bytes(self._exactly(8), "big")
        if not 0 < size <= self.most_header:
            raise Garbled(f"a header of {size} bytes", f"at most {self.most_header} are accepted")
        try:
            header = json.loads(self._exactly(size))
            body, listed = header["body"], header["tensors"]
            shapes = [(DTYPES[name], tuple(shape)) for name, shape in listed]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Garbled("the header of a message cannot be read", repr(error)) from error
        if not isinstance(body, dict):
            raise Garbled("the body of a message is no object")
        left = self.most_bytes
        for dtype, shape in shapes:
            if not all(type(n) is int and 0 <= n <= self.most_bytes for n in shape) or (left := left - math.prod(shape) * dtype.itemsize) < 0:
                raise Garbled(f"a tensor of shape {shape}", f"at most {self.most_bytes} bytes are accepted")
        return body, [self._tensor(dtype, shape) for dtype, shape in shapes]

    def ready(self, seconds: float | None = 0) -> bool:
        """Whether a message (or the end) has begun to arrive within so many seconds; None waits for it."""
        return bool(select.select([self.sock], [], [], seconds)[0])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads
        self.sock.close()

    def _tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        t = torch.empty(shape, dtype=dtype)
        if t.numel():
            self._fill(as_bytes(t))
        return t

    def _exactly(self, size: int) -> bytearray:
        buffer = bytearray(size)
        self._fill(memoryview(buffer))
        return buffer

    def _fill(self, into: memoryview) -> None:
        at = 0
        while at < len(into):
            try:
                count = self.sock.recv_into(into[at:])
            except OSError as error:
                raise Gone("the other process is gone", str(error)) from error
            if not count:
                raise Gone("the other process is gone", "it has closed the connection" + (" within a message" if at else ""))
            at += count


def in_three(error: BaseException) -> dict[str, str]:
    """An error as a message: what, why, and what to do next."""
    if isinstance(error, PellucidError):
        return {"what": error.what, "why": error.why, "next": error.next}
    return {"what": f"{type(error).__name__}: {error}", "why": "", "next": ""}


def as_bytes(t: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place."""
    return t.reshape(-1).view(torch.uint8).numpy().data


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that nobody else can reach."""
    return socket.socketpair()
