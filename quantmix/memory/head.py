"""The output matrix: whether it is the embedding, and where it is multiplied.

Engines keep `token_embd` in RAM and look its rows up there. In a file without `output.weight`
(tied embeddings) it is the head as well: the engines make a second tensor of it, by the same name,
on the device of the output, and read that one whole for every token.

Sources: ik_llama.cpp src/llama-load-tensors.cpp create_embd_output; llama.cpp
src/llama-model-loader.cpp (TENSOR_DUPLICATED).
"""

from __future__ import annotations

from typing import Final, TypeVar

from quantmix.memory.model import HOST, Placement
from quantmix.memory.settings import Settings
from quantmix.models.model import Model, Tensor

_Home = TypeVar("_Home")

EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"


def is_tied(model: Model) -> bool:
    """Whether the output matrix is the embedding."""
    if model.tensors:
        return OUTPUT not in model.by_name
    return model.hparams.tied_embeddings and not model.hparams.output_in_gguf


def head_name(model: Model) -> str:
    """Return the name of the tensor that the head is made of."""
    return EMBEDDING if is_tied(model) else OUTPUT


def multiplied_at(model: Model, t: Tensor, lies: _Home, head: _Home) -> _Home:
    """Return the device that multiplies a tensor: where it lies, but where the head is if tied.

    `lies` is the device of the file's tensor, `head` that of the output.
    """
    return head if t.name == EMBEDDING and is_tied(model) else lies


def host_slots(settings: Settings, n_blocks: int) -> range:
    """Return how many first slots `-ngl` can leave in RAM: blocks, in mainline the output after."""
    return range(n_blocks + (2 if settings.engine == "mainline" else 1))


def head_device(model: Model, settings: Settings, in_ram: int, n_blocks: int, gpu: int) -> int:
    """Return where the head goes with so many first slots in RAM: `gpu`, or HOST if it cannot.

    ik leaves the output in RAM as soon as a block is (`-ngl` at most the number of blocks).
    `-ot` brings `output.weight` back to a GPU, but not a tied head without the embedding itself,
    and with `-ngl 0` it does nothing.
    """
    if settings.engine == "mainline":
        return HOST if in_ram > n_blocks else gpu
    return HOST if in_ram and (is_tied(model) or in_ram >= n_blocks) else gpu


def held_twice(model: Model, settings: Settings, placement: Placement, device: int) -> bool:
    """Whether a device holds the head as a tensor of its own beside the file's embedding.

    On the host both are one mapping of the file; but ik maps nothing once a tensor was overridden
    to the CPU (`use_mmap_buffer &= !has_buft_overrides`), and then allocates both.
    """
    if not is_tied(model) or placement.output_device != device:
        return False
    return device != HOST or (settings.engine == "ik" and bool(placement.cpu_experts))
