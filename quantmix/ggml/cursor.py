"""Reading a header from its beginning, little-endian, where nothing that it claims is believed."""

from __future__ import annotations

import struct
from typing import Any, Final

from quantmix.errors import BadFile
from quantmix.ggml.bytesource import ByteSource

# The largest real headers (262,144-word vocabularies with merges) are about 16 MB.
MAX_HEADER_BYTES: Final = 48 << 20
MAX_STRINGS: Final = 4_000_000
_FIRST_READ: Final = 1 << 20
_READ_AT_MOST: Final = 8 << 20
_U64: Final = struct.Struct("<Q")


class Cursor:
    """A cursor over a growing copy of the file's beginning; every step is checked."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.buf = bytearray()
        self.pos = 0
        self.what = "the preamble"
        self._strings = 0

    def fail(self, problem: str) -> BadFile:
        """Return the error for `problem` at the present place."""
        return BadFile(f"{self.source.name}: {problem} in {self.what}, near byte {self.pos}")

    def need(self, end: int) -> None:
        """Make sure that the buffer reaches `end`."""
        if end <= len(self.buf):
            return
        size = self.source.size
        if size is not None and end > size:
            raise self.fail(f"it ends too early ({end} bytes needed, {size} there)")
        if end > MAX_HEADER_BYTES:
            raise self.fail(f"the header would be larger than {MAX_HEADER_BYTES >> 20} MiB")
        target = min(max(end, 2 * len(self.buf), _FIRST_READ), MAX_HEADER_BYTES)
        target = min(target, size) if size is not None else target
        while len(self.buf) < target:
            at = len(self.buf)
            self.buf += self.source.read(at, min(target - at, _READ_AT_MOST))
            if len(self.buf) == at:
                break
        if end > len(self.buf):
            raise self.fail(f"it ends too early ({end} bytes needed, {len(self.buf)} there)")

    def slice(self, start: int, stop: int) -> bytes:
        """Return bytes that were read already."""
        return bytes(self.buf[start:stop])

    def scalar(self, code: str) -> Any:
        """Read one number of struct code `code`."""
        n = struct.calcsize("<" + code)
        self.need(self.pos + n)
        (value,) = struct.unpack_from("<" + code, self.buf, self.pos)
        self.pos += n
        return value

    def string(self, limit: int) -> bytes:
        """Read a length and that many bytes, at most `limit`."""
        n = self.scalar("Q")
        if n > limit:
            raise self.fail(f"a string of {n} bytes (at most {limit} are allowed)")
        self.need(self.pos + n)
        self.pos += n
        return self.slice(self.pos - n, self.pos)

    def skip(self, count: int, item_bytes: int) -> None:
        """Step over `count` items of fixed size."""
        self.need(self.pos + count * item_bytes)
        self.pos += count * item_bytes

    def skip_strings(self, count: int) -> None:
        """Step over `count` strings; the only loop over untrusted counts, so it is bounded."""
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise self.fail(f"more than {MAX_STRINGS} strings")
        self.need(self.pos + 8 * count)
        pos, left, unpack = self.pos, count, _U64.unpack_from
        while left:
            buf = self.buf
            try:
                while left:
                    pos += 8 + unpack(buf, pos)[0]
                    left -= 1
            except (struct.error, OverflowError, IndexError):
                self.need(pos + 8 * left)
        self.need(pos)
        self.pos = pos
