"""Train with 1-bit weights and activations, and the three recipes that made them work."""

from collections.abc import Iterable
from typing import Any, Literal

from lightning_cnn.precision.low_bit import LowBit


class BinaryNet(LowBit):
    """`Trainer(plugins=[BinaryNet()])`: forward with signs, gradients and optimizer in float.

    activations: whether inputs are binarised too (else the weights alone).
    The other arguments are those of `LowBit`, the general form.
    """

    def __init__(
        self,
        *,
        activations: bool = True,
        scale: bool = True,
        ste: Literal["clip", "approx"] = "clip",
        keep: Iterable[Literal["first", "last"]] = ("first", "last"),
        skip: Iterable[str] = (),
        relu: Literal["drop", "keep"] = "drop",
    ) -> None:
        super().__init__(weights=1, activations=1 if activations else None, scale=scale, ste=ste, keep=keep, skip=skip, relu=relu)


def binary_connect(**changes: Any) -> BinaryNet:
    """1-bit weights without scale in every layer, float activations (Courbariaux et al. 2015, arXiv:1511.00363)."""
    return BinaryNet(**{"activations": False, "scale": False, "keep": (), **changes})


def xnor_net(**changes: Any) -> BinaryNet:
    """1-bit weights and activations, a scale a filter, clipped slope (Rastegari et al. 2016, arXiv:1603.05279)."""
    return BinaryNet(**{"activations": True, "scale": True, "ste": "clip", **changes})


def bi_real(**changes: Any) -> BinaryNet:
    """XNOR-Net with the "approx" slope; build the model with a shortcut around every conv (Liu et al. 2018, arXiv:1808.00278)."""
    return BinaryNet(**{"activations": True, "scale": True, "ste": "approx", **changes})
