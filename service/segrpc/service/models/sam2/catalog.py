"""The published SAM 2 checkpoints: a table, without torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Variant:
    """A published size of SAM 2.

    Attributes:
        name: The model's name in segrpc.
        config: The name of its configuration inside the package ``sam2``.
        hub_id: Its repository on the Hugging Face hub.
        filename: The checkpoint's file name there.
        embed_dim: The channels of the first stage of its image encoder.
        num_blocks: The blocks of its image encoder.
    """

    name: str
    config: str
    hub_id: str
    filename: str
    embed_dim: int
    num_blocks: int


def _variants() -> dict[str, Variant]:
    sizes = (("tiny", "t", 96, 12), ("small", "s", 96, 16), ("base-plus", "b+", 112, 24), ("large", "l", 144, 48))
    found = {}
    for version in ("sam2", "sam2.1"):
        for size, letter, embed_dim, num_blocks in sizes:
            name = f"{version}-hiera-{size}"
            found[name] = Variant(
                name=name,
                config=f"configs/{version}/{version}_hiera_{letter}.yaml",
                hub_id=f"facebook/{name}",
                filename=f"{name.replace('-', '_')}.pt",
                embed_dim=embed_dim,
                num_blocks=num_blocks,
            )
    return found


VARIANTS = _variants()


def name_for_file(checkpoint: Path) -> str | None:
    """Tell the model from a checkpoint's published file name, or None if it has another."""
    return next((v.name for v in VARIANTS.values() if v.filename == checkpoint.name), None)
