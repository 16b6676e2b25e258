"""The targets, their corpora, and mutations of them."""

import importlib
import random
from collections.abc import Callable
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
TARGETS = ("counts", "images", "messages", "sources", "tensors")

Target = Callable[[bytes], None]

# Where lengths and signs wrap round.
_EDGES = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xd9",
)


def target(name: str) -> Target:
    """Return a target: a function of bytes that raises only where there is a bug."""
    found: Target = importlib.import_module(f"tests.fuzz.{name}").run
    return found


def seeds(name: str) -> list[bytes]:
    """Return the inputs that mutation starts from."""
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Change, cut out, repeat or insert a few bytes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        position = chance.randrange(len(changed) + 1)
        kind = chance.randrange(5)
        if kind == 0 and position < len(changed):
            changed[position] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[position : position + chance.randint(1, 16)]
        elif kind == 2:
            changed[position:position] = changed[position : position + chance.randint(1, 16)]
        elif kind == 3:
            edge = chance.choice(_EDGES)
            changed[position : position + len(edge)] = edge
        else:
            changed[position:position] = chance.randbytes(chance.randint(1, 8))
        if not changed:
            changed = bytearray(b"\0")
    return bytes(changed)
