"""Headers over HTTP, against local servers with and without ranges, failing and lying ones."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from quantmix.errors import BadFile
from quantmix.ggml.header import read_header
from quantmix.ggml.types import get
from quantmix.ggml.writer import NewTensor, encode_header, encode_metadata
from quantmix.models.remote import read_url, shard_urls
from quantmix.models.sources import load_model

Handler = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]


class Log:
    """What a server was asked for and how much it sent."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.sent = 0


def ranged(h: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    """Answer range requests as the standard says."""
    match = re.match(r"bytes=(\d+)-(\d+)$", h.headers.get("Range", ""))
    assert match
    start, stop = int(match.group(1)), min(int(match.group(2)) + 1, len(data))
    if start >= len(data):
        h.send_error(416)
        return
    h.send_response(206)
    h.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
    h.send_header("Content-Length", str(stop - start))
    h.end_headers()
    h.wfile.write(data[start:stop])


def whole(h: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    """Ignore ranges, send everything."""
    h.send_response(200)
    h.send_header("Content-Length", str(len(data)))
    h.end_headers()
    h.wfile.write(data)


def nameless_length(h: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
    """Ignore ranges and do not say how much comes."""
    h.send_response(200)
    h.end_headers()
    h.wfile.write(data)


@contextmanager
def serve(files: dict[str, bytes], answer: Handler) -> Iterator[tuple[str, Log]]:
    """Serve `files` on a free local port."""
    log = Log()

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            log.requests.append(self.headers.get("Range", ""))
            data = files.get(self.path.lstrip("/"))
            if data is None:
                self.send_error(404)
                return
            with suppress(BrokenPipeError, ConnectionResetError):
                answer(self, data)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()


def file_of(words: int = 4, data: int = 1 << 10, **keys: object) -> bytes:
    """A GGUF with a vocabulary of `words` and a tensor of `data` rows."""
    kv = {
        "general.architecture": "llama",
        "llama.attention.head_count": 2,
        "tokenizer.ggml.tokens": [f"word{i:08d}" for i in range(words)],
        **keys,
    }
    head, size = encode_header(
        encode_metadata(kv), [NewTensor("token_embd.weight", (32, data), get("f32"))]
    )
    return head + bytes(size)


@pytest.mark.parametrize("answer", [ranged, whole, nameless_length])
@pytest.mark.parametrize("words", [4, 120_000])
def test_header_is_read_the_same_from_any_server(
    answer: Handler, words: int, tmp_path: Path
) -> None:
    """With ranges, without them, and without a length, small and large headers read alike."""
    data = file_of(words)
    (tmp_path / "m.gguf").write_bytes(data)
    local = read_header(tmp_path / "m.gguf")
    with serve({"m.gguf": data}, answer) as (base, _):
        remote = read_url(f"{base}/m.gguf").headers[0]
    assert remote.metadata == local.metadata
    assert remote.tensors == local.tensors
    assert remote.data_offset == local.data_offset
    assert remote.file_bytes == (None if answer is nameless_length else local.file_bytes)


def test_only_the_header_travels() -> None:
    """Of a large file no more than the first reads are fetched."""
    data = file_of(data=200_000)  # 25 MB of tensor data
    with serve({"m.gguf": data}, ranged) as (base, log):
        model = load_model(f"{base}/m.gguf")
    assert model.n_elements == 32 * 200_000
    assert log.requests == ["bytes=0-1048575"]


def test_shards_are_found_by_url() -> None:
    """Any shard's URL leads to all; a query string stays."""
    split = {"split.count": 2, "split.tensors.count": 1}
    first = file_of(**split, **{"split.no": 0})
    second = encode_header(encode_metadata({**split, "split.no": 1}), [])[0]
    files = {"m-00001-of-00002.gguf": first, "m-00002-of-00002.gguf": second}
    with serve(files, ranged) as (base, _):
        assert len(read_url(f"{base}/m-00002-of-00002.gguf").headers) == 2
        del files["m-00002-of-00002.gguf"]
        with pytest.raises(BadFile, match="404"):
            read_url(f"{base}/m-00001-of-00002.gguf")
    assert shard_urls("https://h/a/m-00001-of-00002.gguf?download=true") == [
        "https://h/a/m-00001-of-00002.gguf?download=true",
        "https://h/a/m-00002-of-00002.gguf?download=true",
    ]


def test_refusals_are_not_retried_but_failures_are() -> None:
    """404 is final; 503 is tried again a limited number of times; then a clear error."""
    with serve({}, ranged) as (base, log):
        with pytest.raises(BadFile, match="404"):
            read_url(f"{base}/m.gguf", pause=0.01)
        assert len(log.requests) == 1

    def busy(h: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
        h.send_error(503)

    with serve({"m.gguf": b""}, busy) as (base, log):
        with pytest.raises(BadFile, match=r"503 .*3 attempts"):
            read_url(f"{base}/m.gguf", pause=0.01)
        assert len(log.requests) == 3


def test_one_failure_is_survived() -> None:
    """A connection that breaks once does not end the reading."""
    broken = iter([True])

    def flaky(h: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
        if next(broken, False):
            h.send_response(206)
            h.send_header("Content-Range", f"bytes 0-{len(data) - 1}/{len(data)}")
            h.send_header("Content-Length", str(len(data)))
            h.end_headers()
            h.wfile.write(data[:10])
            h.close_connection = True
            return
        ranged(h, data)

    with serve({"m.gguf": file_of()}, flaky) as (base, log):
        assert read_url(f"{base}/m.gguf", pause=0.01).tensors
        assert len(log.requests) == 2


def test_silence_is_bounded() -> None:
    """A server that never answers costs the time-out, three times, not more."""
    gate = threading.Event()

    def silent(h: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
        gate.wait(10)

    with serve({"m.gguf": b""}, silent) as (base, _):
        with pytest.raises(BadFile, match=r"timed out .*3 attempts"):
            read_url(f"{base}/m.gguf", timeout=0.2, pause=0.01)
        gate.set()


def test_lies_are_refused() -> None:
    """A page that is not GGUF, a wrong range, a shrunken file: refused with the URL."""

    def wrong_range(h: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
        h.send_response(206)
        h.send_header("Content-Range", f"bytes 5-{len(data)}/{len(data)}")
        h.end_headers()

    with (
        serve({"m.gguf": b"<html>Not found, but politely</html>"}, whole) as (base, _),
        pytest.raises(BadFile, match="not a GGUF"),
    ):
        read_url(f"{base}/m.gguf")
    with (
        serve({"m.gguf": file_of()}, wrong_range) as (base, _),
        pytest.raises(BadFile, match="another range"),
    ):
        read_url(f"{base}/m.gguf", pause=0.01)
    with (
        serve({"m.gguf": file_of()[:-64]}, ranged) as (base, _),
        pytest.raises(BadFile, match="truncated"),
    ):
        read_url(f"{base}/m.gguf")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://", "ftp://h/m.gguf"])
def test_only_http_urls(url: str) -> None:
    """Other schemes are refused before anything is opened."""
    with pytest.raises(BadFile):
        read_url(url)


def test_unreachable_host_is_one_clear_error() -> None:
    """A closed port is an error that says to check address and network."""
    with pytest.raises(BadFile, match="check address and network"):
        read_url("http://127.0.0.1:9/m.gguf", pause=0.01)
