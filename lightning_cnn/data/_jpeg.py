"""JPEG bytes in and out, without trusting them: a picture's size is read from its header before anything is allocated."""

import io
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from lightning_cnn.errors import DataError
from lightning_cnn.kernels.jpeg import SLACK, decode_crops

# A block of 64 pixels of one channel takes a bit at least, and a picture with halved colour 6 blocks per 256 pixels.
PIXELS_PER_BYTE = 512
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def encode(image: Tensor, quality: int) -> bytes:
    """With a restart marker after each row of blocks: a few bytes each, and a crop is decoded without what is above it."""
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=quality, restart_marker_rows=1)
    return stream.getvalue()


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


def crops(source: np.ndarray, rows: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes, where each begins, which are there) of the boxes (top, left, height, width) of the JPEGs of some index entries.

    Those that are not there are for `decode`: unusual JPEGs, and damaged ones.
    """
    height, width, length = (rows[name].astype(np.int64) for name in ("height", "width", "length"))
    possible = height * width <= PIXELS_PER_BYTE * length
    sizes = 3 * box[:, 2] * box[:, 3] * possible + SLACK
    place = np.cumsum(sizes) - sizes
    pixels = np.empty(int(sizes.sum()), np.uint8)
    height[~possible] = 0  # which no JPEG says of itself
    return pixels, place, decode_crops(source, rows["offset"].astype(np.int64), length, height, width, box, pixels, place)


def _tensor(encoded: np.ndarray) -> Tensor:
    # torch warns of read-only memory; decode_jpeg only reads.
    return torch.from_numpy(encoded if encoded.flags.writeable else encoded.copy())
