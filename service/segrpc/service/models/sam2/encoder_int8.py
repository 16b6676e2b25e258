"""Products of SAM 2's image encoder in whole numbers: `FastEncoder` takes them instead of those in float32, if told to.

They cost accuracy: `docs/numerics.md` has what was measured.
"""

import torch
from torch import Tensor


class Int8Linear:
    """A linear layer ``[out, in]`` with weights of 8 bits, a scale for each output; see `Linear` for the methods.

    What it is applied to is brought to 8 bits by its own least and largest value, and the result is in float32.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.bias = bias.detach()
        self._scale = weight.detach().abs().amax(1).clamp(min=1e-12) / 127
        rounded = (weight.detach() / self._scale[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zero = torch.zeros(len(weight), dtype=torch.int64)

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """See `Linear`."""
        given = (*_rounded(x), self._weight, self._scale, self._zero, self.bias)
        found: Tensor = torch.ops.onednn.qlinear_pointwise(*given, 1.0, 0, torch.float32, activation, [], "none")
        return found

    def added(self, x: Tensor, to: Tensor) -> Tensor:
        """See `Linear`; the result is in the memory of `to`."""
        given = (*_rounded(x), self._weight, self._scale, self._zero, to, self.bias)
        found: Tensor = torch.ops.onednn.qlinear_pointwise.binary(
            *given, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], ""
        )
        return found

    @classmethod
    def works(cls) -> bool:
        """Tell whether this build of torch and this CPU have what it takes.

        Without VNNI oneDNN adds pairs of products in 16 bits, where they do not fit.
        """
        try:
            linear, x = cls(torch.eye(2), torch.zeros(2)), torch.ones(1, 2)
            linear.added(linear(x, "gelu"), x)
            return bool(torch.cpu._is_vnni_supported())
        except (AttributeError, RuntimeError):
            return False


def _rounded(x: Tensor) -> tuple[Tensor, float, int]:
    """Return numbers ``q`` of 0 to 255, and ``scale`` and ``zero`` so that x is about ``scale * (q - zero)``."""
    low, high = (float(one) for one in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 1e-12)
    # One step of the 255 is left for rounding `zero`: a number beyond would not be clamped but wrap around.
    scale = (high - low) / 254
    zero = round(-low / scale)
    # Conversion cuts off, so the half makes it round.
    return torch.add(torch.tensor(zero + 0.5), x, alpha=1 / scale).to(torch.uint8), scale, zero
