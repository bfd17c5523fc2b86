"""The Hugging Face hub through the real `huggingface_hub`, against a local server."""

from __future__ import annotations

import hashlib
import http.server
import importlib
import json
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantmix.errors import BadFile
from quantmix.ggml.types import get
from quantmix.ggml.writer import NewTensor, encode_header, encode_metadata
from quantmix.models.several import gguf_specs
from quantmix.models.sources import load_model
from quantmix.offers import offers

pytest.importorskip("huggingface_hub")

HERE = Path(__file__).parent
CONFIGS = json.loads((HERE / "hf_configs.json").read_text())
COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as downloads, listings and header reads use."""

    files: dict[str, bytes]

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/"):
            repo = "/".join(path.split("/")[3:5])
            names = [p.split("/", 2)[2] for p in self.files if p.startswith(repo + "/")]
            if not names:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
                return
            listing = [{"type": "file", "path": n, "oid": "0", "size": 1} for n in names]
            doc: Any = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            raw = json.dumps(listing if "/tree/" in path else doc).encode()
            self._send(200, raw, {"Content-Type": "application/json"}, body)
            return
        org, name, _, _, *rest = path.strip("/").split("/")
        data = self.files.get("/".join([org, name, *rest]))
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        asked = self.headers.get("Range")
        if asked:
            start, _, stop = asked.removeprefix("bytes=").partition("-")
            part = data[int(start) : int(stop) + 1 if stop else None]
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
            self._send(206, part, headers, body)
            return
        self._send(200, data, headers, body)

    def _send(self, code: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def shapes_file(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of zeros."""
    doc, at = {}, 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        doc[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(doc).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(at)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point the real library at a local server with four repositories."""
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    kv = {"general.architecture": "llama", "llama.attention.head_count": 2}
    head, size = encode_header(
        encode_metadata(kv), [NewTensor("token_embd.weight", (8, 9), get("f32"))]
    )
    other = {"model.embed_tokens.weight": (9, 8), "model.layers.0.mlp.up_proj.weight": (4, 8)}
    Hub.files = {
        "org/DeepSeek-R1/config.json": json.dumps(CONFIGS["deepseek-r1"]).encode(),
        "org/DeepSeek-R1/model.safetensors.index.json": json.dumps(index).encode(),
        "org/R1-GGUF/m-q4.gguf": head + bytes(size),
        "org/R1-GGUF/IQ2/m-00001-of-00002.gguf": b"GGUF",
        "org/R1-GGUF/IQ2/m-00002-of-00002.gguf": b"GGUF",
        "org/R1-GGUF/mmproj-m.gguf": b"GGUF",
        "org/New/config.json": b'{"model_type": "new", "num_attention_heads": 2}',
        "org/New/model.safetensors": shapes_file(other),
        "org/Empty/README.md": b"nothing",
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    patch.setenv("HF_HUB_DISABLE_XET", "1")
    patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in [n for n in sys.modules if n.split(".")[0] == "huggingface_hub"]:
        patch.delitem(sys.modules, name)
    importlib.import_module("huggingface_hub")
    yield
    patch.undo()
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_known_family_from_config_and_index() -> None:
    """A repository of a known family is its catalog model, no weights fetched."""
    model = load_model("hf:org/DeepSeek-R1")
    assert model.tensors == load_model("deepseek-r1").tensors
    assert (model.id, model.source) == ("deepseek-r1", "hf:org/DeepSeek-R1")
    assert len(load_model("hf:org/DeepSeek-R1", layout="ik").tensors) == 1147


@pytest.mark.usefixtures("hub")
def test_unknown_family_from_headers() -> None:
    """An unknown family is read from the safetensors headers and says so."""
    model = load_model("hf:org/New")
    assert {(t.name, t.shape) for t in model.tensors} == {
        ("token_embd.weight", (8, 9)),
        ("blk.0.ffn_up.weight", (8, 4)),
    }
    assert "unknown" in model.notes[0]


@pytest.mark.usefixtures("hub")
def test_gguf_in_a_repository() -> None:
    """One GGUF of a repository is read by ranges; without its name the files are listed."""
    assert load_model("hf:org/R1-GGUF/m-q4.gguf").n_elements == 72
    with pytest.raises(BadFile, match=r"m-q4\.gguf"):
        load_model("hf:org/R1-GGUF")


@pytest.mark.usefixtures("hub")
def test_all_files_of_a_repository() -> None:
    """One name per model, shards counted once; a folder of it has its own; nothing is an error."""
    files = ["hf:org/R1-GGUF/IQ2/m-00001-of-00002.gguf", "hf:org/R1-GGUF/m-q4.gguf"]
    assert gguf_specs("hf:org/R1-GGUF") == files
    assert gguf_specs("hf:org/R1-GGUF/IQ2") == files[:1]
    assert gguf_specs(files[1]) == files[1:]
    for spec in ("hf:org/R1-GGUF/IQ3", "hf:org/New", "hf:org/absent"):
        with pytest.raises(BadFile):
            gguf_specs(spec)


@pytest.mark.usefixtures("hub")
def test_offers_of_a_repository_can_be_fetched() -> None:
    """Each with the command that fetches all of it; what cannot be read is left out."""
    found = offers(["hf:org/R1-GGUF"])
    assert [(name, "IQ2" in why) for name, why in found.left_out] == [("m", True)]
    (offer,) = found.files
    assert offer.fetch[:5] == ["hf", "download", "org/R1-GGUF", "--include", "m-q4.gguf"]
    assert offer.file == "m-q4.gguf"
    split = replace(offer, source="hf:org/R1-GGUF/IQ2/m-00001-of-00002.gguf")
    assert split.fetch[4] == "IQ2/m-*.gguf"
    assert split.file == "IQ2/m-00001-of-00002.gguf"


def test_without_a_network_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library lets errors of its HTTP client out, which are no errors of its own."""
    import huggingface_hub

    client = sys.modules.get("httpx2") or sys.modules.get("httpx")
    error = client.ConnectError("no route") if client else ConnectionError("no route")

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(BadFile, match="no route: check the name and the network"):
        gguf_specs("hf:org/name")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("spec", ["hf:org/absent", "hf:org/Empty", "hf:or g/na:me"])
def test_what_is_not_there_is_one_clear_error(spec: str) -> None:
    """Absent, empty and impossible repositories are refused in one line."""
    with pytest.raises(BadFile) as err:
        load_model(spec)
    assert "\n" not in str(err.value)


@pytest.mark.usefixtures("hub")
def test_a_hub_that_is_not_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library's HTTP client raises without a network names the repository."""
    library = importlib.import_module("huggingface_hub")
    client = library.errors.HfHubHTTPError.__mro__[1]

    def failing(*args: object, **kwargs: object) -> None:
        raise client("Name or service not known")

    monkeypatch.setattr(library, "hf_hub_download", failing)
    with pytest.raises(BadFile, match="hf:org/New cannot be read: Name or service not known"):
        load_model("hf:org/New")
