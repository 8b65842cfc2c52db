"""What a conversion gives back. Importing it loads no engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did, e.g. ``Converted("torch_dist", "/m", 25, 421888, 0, 25, 1.2, 5e8)``."""

    kind: str
    """torch_dist or huggingface: what was written."""
    target: str
    tensors: int
    bytes: int
    resumed_parts: int
    """Parts that an interrupted conversion had written already."""
    verified: int
    """Tensors whose checksum was compared after reading the result back; 0 without ``verify``."""
    seconds: float
    peak_bytes: int
    """Most memory that this process ever had."""
