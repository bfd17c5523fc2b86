"""Vocabulary of the memory model: where blocks live, and what a device holds besides weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

HOST = -1


@dataclass(frozen=True, slots=True)
class Placement:
    """Where blocks live, whatever their types.

    Attributes:
        layer_device: per block the index of its GPU, or HOST. Attention, norms, router, shared
            experts, dense FFN and KV cache of the block lie there.
        output_device: GPU index of `output` and `output_norm` (last GPU of the split), or HOST.
        cpu_experts: layers whose routed experts lie in RAM although the layer is on a GPU.
    """

    layer_device: tuple[int, ...]
    output_device: int
    cpu_experts: frozenset[int] = frozenset()

    @property
    def gpus(self) -> tuple[int, ...]:
        """GPUs in use, in order; the flags hide the others (`emit.flags.environment`)."""
        return tuple(sorted({*self.layer_device, self.output_device} - {HOST}))

    def on(self, cards: Sequence[int]) -> Placement:
        """Return the placement with GPU i of it being GPU `cards[i]` of a rig (`Rig.only`)."""
        names = {HOST: HOST, **dict(enumerate(cards))}
        return replace(
            self,
            layer_device=tuple(names[d] for d in self.layer_device),
            output_device=names[self.output_device],
        )

    def homes(self, n_blocks: int) -> tuple[int, ...]:
        """Return the device of each of `n_blocks`; those beyond the plan follow its last block."""
        planned = self.layer_device[:n_blocks]
        last = planned[-1] if planned else self.output_device
        return (*planned, *([last] * (n_blocks - len(planned))))


@dataclass(frozen=True, slots=True)
class Regime:
    """One line of the compute-buffer maximum: `constant_bytes + coefficient × S`.

    S is the byte size of the largest single routed-expert tensor in RAM (op-offload copies it).
    """

    name: str
    constant_bytes: int
    coefficient: float = 0.0

    def bytes_at(self, cpu_expert_bytes: int) -> int:
        """Bytes of this regime when the largest expert tensor in RAM has that many bytes."""
        return self.constant_bytes + ceil(self.coefficient * cpu_expert_bytes)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What one device holds besides the weights of the file; all figures are safe upper bounds.

    `compute` lists regimes; the buffer is their maximum. `duplicate_embedding`: a tied head lies
    there as a tensor of its own, with as many bytes as the embedding (`head.held_twice`).
    """

    name: str
    kv_bytes: int
    derived_bytes: int
    reserve_bytes: int
    compute: tuple[Regime, ...]
    duplicate_embedding: bool = False

    def compute_bytes(self, cpu_expert_bytes: int = 0) -> int:
        """Size of the compute buffer, safety margin included."""
        return max((r.bytes_at(cpu_expert_bytes) for r in self.compute), default=0)

    def fixed_bytes(self, cpu_expert_bytes: int = 0) -> int:
        """Everything that is not weights."""
        return (
            self.kv_bytes
            + self.derived_bytes
            + self.reserve_bytes
            + self.compute_bytes(cpu_expert_bytes)
        )
