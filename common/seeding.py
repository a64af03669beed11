"""Everything random, from a stable hash.

A number drawn for a pair depends on (seed, pair id, purpose) alone, so that the cache does not depend on batch size,
sharding, order or the number of workers. Python's own hash() is salted per process and must not be used for this.
"""

import hashlib

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def stable_hash(*parts: object, bits: int = 64) -> int:
    """A `bits`-wide unsigned integer from the parts' text, by blake2b; equal on every machine and Python."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=bits // 8).digest(), "little")


def library_seed(seed: int) -> int:
    """The seed, or where it is not one a hash of it, for generators that take 32 bits, none below 0, and to which
    libraries add a process's number."""
    return seed if 0 <= seed < 1 << 31 else stable_hash(seed, bits=32) >> 1


def uniform(*parts: object) -> float:
    """A float in [0, 1) from the parts, with 32 random bits: i + u stays below i + 1 in float64 for any index i."""
    return (stable_hash(*parts) >> 32) / float(1 << 32)


def generator(*parts: object) -> np.random.Generator:
    """A numpy generator seeded by the parts (Philox: its stream is fixed across numpy versions)."""
    return np.random.Generator(np.random.Philox(key=stable_hash(*parts, bits=128)))


def normal(shape: tuple[int, ...], *parts: object) -> Float[Tensor, "..."]:
    """Standard normal float32 tensor from the parts, drawn on the CPU."""
    torch_generator = torch.Generator().manual_seed(stable_hash(*parts) >> 1)
    return torch.randn(shape, generator=torch_generator)
