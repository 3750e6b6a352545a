"""Messages between processes: what is sent arrives, and what is no message is refused before memory is taken."""

import json
import socket
import threading

import pytest
import torch

from pellucid.parallel.wire import DTYPES, Channel, Garbled, Gone, pair


@pytest.fixture
def ends():
    a, b = pair()
    left, right = Channel(a), Channel(b, most_header=1 << 20, most_bytes=1 << 22)
    yield left, right
    left.close()
    right.close()


def frame(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "big") + text


def test_bodies_and_tensors_of_every_dtype_and_shape_arrive(ends):
    left, right = ends
    sent = [torch.randint(0, 2, (3, 2)).to(dtype) for dtype in DTYPES.values()]
    sent += [torch.randn(4, 6).T[1:], torch.empty(0, 5), torch.tensor(3.5)]  # not contiguous; of no number; of no dimension
    left.send({"do": "step", "text": "句子\n", "x": [1.5, None, -0.1]}, sent)
    left.send({"do": "next"})
    body, got = right.receive()
    assert body == {"do": "step", "text": "句子\n", "x": [1.5, None, -0.1]}
    for a, b in zip(sent, got, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    assert right.ready() and right.receive() == ({"do": "next"}, []) and not right.ready()


def test_a_message_larger_than_the_sockets_buffer_arrives_whole(ends):
    left, right = ends
    big = torch.randn(700_000)
    thread = threading.Thread(target=left.send, args=({"n": 1}, [big]))
    thread.start()
    assert torch.equal(right.receive()[1][0], big)
    thread.join()


@pytest.mark.parametrize("data", [
    (1 << 21).to_bytes(8, "big"),  # a header beyond the limit
    (0).to_bytes(8, "big"),
    frame(b"\x80\x04K\x01."),  # a pickle
    frame(b"[" * 100_000),
    frame([1, 2]),
    frame({"body": {}}),
    frame({"body": 3, "tensors": []}),
    frame({"body": {}, "tensors": [["F31", [1]]]}),
    frame({"body": {}, "tensors": [["F32", [1 << 40]]]}),  # four TiB
    frame({"body": {}, "tensors": [["F32", [0, 1 << 70]]]}),  # of no number, and no possible shape
    frame({"body": {}, "tensors": [["F32", [1 << 19]], ["F32", [1 << 20]]]}),  # together beyond the limit
    frame({"body": {}, "tensors": [["F32", [-1, -4]]]}),
    frame({"body": {}, "tensors": [["F32", [True]]]}),
    frame({"body": {}, "tensors": [["F32", "12"]]}),
])
def test_what_is_no_message_is_refused(ends, data):
    left, right = ends
    left.sock.sendall(data)
    with pytest.raises(Garbled):
        right.receive()


@pytest.mark.parametrize("data", [b"", b"\0\0", frame({"body": {}, "tensors": [["F32", [4]]]}) + b"1234567"])
def test_an_end_of_the_stream_is_told(ends, data):
    left, right = ends
    left.sock.sendall(data)
    left.close()
    with pytest.raises(Gone):
        right.receive()


def test_sending_to_nobody_is_told(ends):
    left, right = ends
    right.close()
    with pytest.raises(Gone):
        for _ in range(10):
            left.send({"x": "y" * 100_000})


def test_a_waiting_reader_wakes_when_its_end_is_closed(ends):
    left, _ = ends
    heard = []

    def read():
        try:
            left.receive()
        except Gone as gone:
            heard.append(gone)

    thread = threading.Thread(target=read)
    thread.start()
    left.close()
    thread.join(5)
    assert not thread.is_alive() and heard


def test_a_plain_socket_stays_as_it_was():
    a, b = pair()
    assert a.family == b.family and a.type == socket.SOCK_STREAM
    a.close()
    b.close()
