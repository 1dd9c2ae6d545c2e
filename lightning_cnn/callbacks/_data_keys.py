"""What the fields of a batch besides its pictures are, in Kornia's words: `{"mask": "mask", "boxes": "bbox_xyxy", "eyes": "keypoints"}`."""

from collections.abc import Mapping
from typing import Any

KINDS = ("mask", "bbox", "bbox_xyxy", "bbox_xywh", "keypoints")
IMAGE = ("input", "image")  # the picture may be listed too, as BatchAugmentation wants it


def unknown_kinds(data_keys: Mapping[Any, str]) -> list[str]:
    return [
        f"data_keys: {key!r} is {kind!r}; known are {', '.join(KINDS)}." for key, kind in data_keys.items() if kind not in KINDS + IMAGE
    ]
