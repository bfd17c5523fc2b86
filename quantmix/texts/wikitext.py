"""wiki.test.raw, the text that published perplexities are measured on, fetched by checksum.

It is part of WikiText-2 (Merity et al. 2016; Wikipedia text, CC BY-SA) and is not shipped. Archive
and checksums are those the llama.cpp project uses (dataset ggml-org/ci, 1,290,590 bytes of text).
"""

from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Final

from quantmix.errors import BadFile, EngineError
from quantmix.files import write_bytes

URL: Final = "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip"
MEMBER: Final = "wikitext-2-raw/wiki.test.raw"
SHA256: Final = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
_MAX_BYTES: Final = 64 << 20
_TIMEOUT_SECONDS: Final = 60


def fetch(out: Path, url: str = URL) -> bool:
    """Write wiki.test.raw to `out`; return False when the right file is already there.

    Raises:
        EngineError: no network, or the server refuses.
        BadFile: what came is not the text with the known checksum.
    """
    if out.is_file() and hashlib.sha256(out.read_bytes()).hexdigest() == SHA256:
        return False
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
            archive = answer.read(_MAX_BYTES)
    except (urllib.error.URLError, OSError, ValueError) as err:
        reason = getattr(err, "reason", err)
        raise EngineError(
            f"cannot fetch {url}: {reason}; offline, get wiki.test.raw from elsewhere (SHA-256 "
            f"{SHA256}) or use the shipped texts (leave --corpus out)"
        ) from err
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            if opened.getinfo(MEMBER).file_size > _MAX_BYTES:
                raise BadFile(f"{url} holds a {MEMBER} of absurd size")
            text = opened.read(MEMBER)
    except (zipfile.BadZipFile, KeyError) as err:
        raise BadFile(f"{url} is no archive with {MEMBER}: {err}") from err
    found = hashlib.sha256(text).hexdigest()
    if found != SHA256:
        raise BadFile(f"{MEMBER} from {url} has SHA-256 {found}, expected {SHA256}: not kept")
    write_bytes(out, text)
    return True
