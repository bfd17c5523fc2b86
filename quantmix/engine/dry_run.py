"""What an engine's dry run says of one tensor, whichever engine it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from quantmix.ggml.types import drop_ones
from quantmix.units import MIB


@dataclass(frozen=True, slots=True)
class DryTensor:
    """One tensor as the engine would write it.

    Attributes:
        shape: ggml order, row length first, trailing ones dropped.
        type: what it would be; its own when the tensor is left as it is.
        bytes: rows × row size of `type`, by the engine's own library where that was asked, else by
            quantmix's table.
        printed_mib, digits: the size that the engine printed, in MiB, and its decimals.
        fell_back: mainline replaced the type asked for because the rows do not divide.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    printed_mib: float
    digits: int
    fell_back: bool = False

    @property
    def print_agrees(self) -> bool:
        """Whether the printed size is `bytes`, within the rounding of the print."""
        return abs(self.bytes / MIB - self.printed_mib) <= 0.5 * 10.0**-self.digits + 1e-9


def read_tensor(
    name: str,
    shape: str,
    kind: str,
    printed: str,
    row_bytes: Callable[[int], int],
    *,
    fell_back: bool = False,
) -> DryTensor:
    """Return a tensor from the words of a log; `row_bytes` gives the bytes of a row's columns."""
    dims = drop_ones(int(n) for n in shape.split(","))
    n_bytes = row_bytes(dims[0]) * prod(dims[1:])
    digits = len(printed.partition(".")[2])
    return DryTensor(name, dims, kind, n_bytes, float(printed), digits, fell_back)
