"""Tensor lists from hyper-parameters, one module per architecture family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from quantmix.errors import UnknownName
from quantmix.ggml.types import drop_ones
from quantmix.models.arch import base, gemma, glm4moe, gpt_oss, hybrid, llama, mla
from quantmix.models.arch.base import Entry
from quantmix.models.model import HParams, Layout, Tensor

_FAMILIES = (mla, llama, glm4moe, hybrid, gpt_oss, gemma)
_ENTRIES: Final[dict[str, Callable[[HParams, str, Layout], Iterator[Entry]]]] = {
    arch: family.entries for family in _FAMILIES for arch in family.ARCHS
}
ARCHITECTURES: Final[tuple[str, ...]] = tuple(_ENTRIES)


def tensors_of(h: HParams, arch: str, layout: Layout = "plain") -> tuple[Tensor, ...]:
    """Return the tensors of an unquantized conversion, in file order.

    Raises:
        UnknownName: no family module knows `arch`.
    """
    if arch not in _ENTRIES:
        raise UnknownName.of("architecture", arch, ARCHITECTURES)
    mxfp4 = arch in gpt_oss.ARCHS
    tensors = []
    for name, shape in _ENTRIES[arch](h, arch, layout):
        dtype = base.source_type(name, drop_ones(shape), h, mxfp4)
        tensors.append(
            base.as_tensor(
                name, shape, dtype, h, has_output=h.output_in_gguf, has_k_b=layout == "ik",
                exact_type=trained_in(arch, dtype),
            )
        )  # fmt: skip
    return tuple(tensors)


def trained_in(arch: str, dtype: str) -> str:
    """Return `dtype` when it is quantized and what such a model was trained in, else nothing."""
    return dtype if arch in gpt_oss.ARCHS and dtype == gpt_oss.EXPERTS_TYPE else ""
