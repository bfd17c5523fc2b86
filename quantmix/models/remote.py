"""GGUF headers over http(s), without the data: by range requests, or by reading only the start.

A server that ignores `Range` answers 200 with the whole file; then the stream is read as far as
the header goes and closed. Time-outs and a limited number of retries bound the waiting.
"""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, Final

from quantmix.errors import BadFile
from quantmix.ggml.header import Header, parse
from quantmix.ggml.shards import GgufSet, merge, numbers_of, prefix_of, shard_names

TIMEOUT_SECONDS: Final = 20.0
ATTEMPTS: Final = 3
MAX_SHARDS: Final = 2000
_FIRST: Final = 1 << 20
_RANGE: Final = re.compile(r"^bytes (\d+)-(\d+)/(\d+|\*)$")
_RETRIED: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


def read_url(
    url: str,
    *,
    timeout: float = TIMEOUT_SECONDS,
    pause: float = 1.0,
    headers: Mapping[str, str] | None = None,
) -> GgufSet:
    """Read the headers of a GGUF at an http(s) URL, of all shards when it is one of several.

    Args:
        timeout: seconds without an answer before an attempt is given up.
        pause: seconds before the second attempt, doubled before each further one.
        headers: sent with every request, but not to where it is redirected.

    Raises:
        BadFile: not reachable after retries, refused by the server, or not a GGUF.
    """
    urls = shard_urls(url)
    found = tuple(_read_one(u, timeout, pause, headers or {}) for u in urls)
    return merge(found, prefix_of(_file_name(url)))


def shard_urls(url: str) -> list[str]:
    """Return the URLs of all shards that the file name promises, or the URL alone.

    Raises:
        BadFile: not an http(s) URL, or a shard number that cannot be.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise BadFile(f"{url!r} is not an http(s) URL of a GGUF file")
    folder, slash, name = parts.path.rpartition("/")
    shard = numbers_of(name)
    if shard is None:
        return [url]
    prefix, no, count = shard
    if not 1 <= no <= count <= MAX_SHARDS:
        raise BadFile(f"{url}: shard {no} of {count} cannot be (at most {MAX_SHARDS} are read)")
    names = shard_names(prefix, count)
    return [urllib.parse.urlunsplit(parts._replace(path=folder + slash + n)) for n in names]


def _file_name(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])


def _read_one(url: str, timeout: float, pause: float, headers: Mapping[str, str]) -> Header:
    source = HttpSource(url, timeout, pause, headers)
    try:
        return parse(source)
    finally:
        source.close()


class HttpSource:
    """A ByteSource over http(s); state: the open stream, where it stands, the size once known."""

    def __init__(
        self,
        url: str,
        timeout: float = TIMEOUT_SECONDS,
        pause: float = 1.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.name = url
        self.headers = dict(headers or {})
        self.timeout, self.pause = timeout, pause
        self.size: int | None = None
        self._stream: Any = None
        self._at = 0
        self._first = self._fetch(0, _FIRST)

    def read(self, offset: int, count: int) -> bytes:
        """Return up to `count` bytes at `offset`.

        Raises:
            BadFile: the server failed, or the file changed between two requests.
        """
        if offset + count <= len(self._first) or len(self._first) == self.size:
            return self._first[offset : offset + count]
        if offset < len(self._first):
            return self._first[offset:]
        return self._fetch(offset, count)

    def close(self) -> None:
        """Drop the connection."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _fetch(self, offset: int, count: int) -> bytes:
        wait = self.pause
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._try(offset, count)
            except urllib.error.HTTPError as err:
                err.close()
                if err.code == 416:
                    return b""
                problem = f"the server answered {err.code} {err.reason}"
                if err.code not in _RETRIED:
                    raise BadFile(f"{self.name}: {problem}: check the address") from None
            except (OSError, http.client.HTTPException) as err:
                reason = getattr(err, "reason", None) or err
                problem = str(reason) or type(reason).__name__
            self.close()
            if attempt < ATTEMPTS:
                time.sleep(wait)
                wait *= 2
        raise BadFile(f"{self.name}: {problem} ({ATTEMPTS} attempts): check address and network")

    def _try(self, offset: int, count: int) -> bytes:
        if self._stream is None or self._at != offset:
            self.close()
            self._open(offset, count)
        data = bytes(self._stream.read(count))
        self._at += len(data)
        short = len(data) < count and (self.size is None or self._at < self.size)
        if short and self.size is not None:
            raise http.client.IncompleteRead(data, count - len(data))
        return data

    def _open(self, offset: int, count: int) -> None:
        request = urllib.request.Request(
            self.name,
            headers={
                "User-Agent": "quantmix",
                "Range": f"bytes={offset}-{offset + count - 1}",
                "Accept-Encoding": "identity",
            },
        )
        for key, value in self.headers.items():
            # A redirect may lead to another host, which must not see an access token.
            request.add_unredirected_header(key, value)
        stream = urllib.request.urlopen(request, timeout=self.timeout)
        self._stream, self._at = stream, 0
        if stream.status == 206:
            match = _RANGE.match(stream.headers.get("Content-Range", ""))
            if match is None or int(match.group(1)) != offset:
                raise BadFile(f"{self.name}: the server answered with another range than asked for")
            self._at = offset
            self._learn_size(None if match.group(3) == "*" else int(match.group(3)))
            return
        length = stream.headers.get("Content-Length", "")
        self._learn_size(int(length) if length.isdecimal() else None)
        while self._at < offset:
            skipped = stream.read(min(offset - self._at, _FIRST))
            if not skipped:
                raise http.client.IncompleteRead(b"", offset - self._at)
            self._at += len(skipped)

    def _learn_size(self, size: int | None) -> None:
        if self.size is not None and size is not None and size != self.size:
            raise BadFile(f"{self.name}: the file changed while it was read ({self.size} → {size})")
        self.size = self.size if size is None else size
