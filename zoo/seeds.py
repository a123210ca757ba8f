"""Random streams of their own: replacing one entry of a stack leaves what all others draw alone.

A model draws one number from the global generator. Every module of entry i is initialised from a
stream derived from that number, from i, and from the module's place within the entry, so neither
the other parameters nor the global generator afterwards can tell which mixer stood there.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def draw() -> int:
    """A number from the global CPU generator, on whatever device modules are being built."""
    return int(torch.randint(2**62, (), device="cpu"))


def derive(seed: int, *place: int) -> int:
    """The seed of a stream, unrelated to those of other places."""
    words = "/".join(str(number) for number in (seed, *place))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` within the block; the global generators go on as if nothing happened."""
    # Seeding CUDA before it is in use would be queued, and would outlive the block.
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else range(0)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield
