"""JPEG bytes in and out, without trusting them: a picture's size is read from its header before anything is allocated."""

from typing import cast

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from lightning_cnn.errors import DataError

# A block of 64 pixels of one channel takes a bit at least, and a picture with halved colour 6 blocks per 256 pixels.
PIXELS_PER_BYTE = 512
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def encode(image: Tensor, quality: int) -> bytes:
    return cast(Tensor, encode_jpeg(image, quality)).numpy().tobytes()


def size(encoded: bytes | np.ndarray) -> tuple[int, int]:
    """(height, width) as the frame header states them.

    >>> size(encode(torch.zeros(3, 5, 7, dtype=torch.uint8), 90))
    (5, 7)
    """
    data = memoryview(encoded) if isinstance(encoded, bytes) else encoded.data
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in FRAME_MARKERS:
            return int.from_bytes(data[position + 5 : position + 7]), int.from_bytes(data[position + 7 : position + 9])
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4])
    raise DataError("no JPEG frame header found")


def decode(encoded: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3); another size, or more pixels than the bytes can hold, is refused before decoding."""
    if size(encoded) != (height, width) or height * width > PIXELS_PER_BYTE * len(encoded):
        raise DataError(f"a JPEG of {len(encoded)} bytes and {size(encoded)} pixels stands where {height} x {width} pixels should")
    try:
        image = cast(Tensor, decode_jpeg(_tensor(encoded), ImageReadMode.RGB))
    except RuntimeError as error:
        raise DataError(f"the JPEG cannot be decoded: {error}") from error
    return image.permute(1, 2, 0).numpy()


def _tensor(encoded: np.ndarray) -> Tensor:
    # torch warns of read-only memory; decode_jpeg only reads.
    return torch.from_numpy(encoded if encoded.flags.writeable else encoded.copy())
