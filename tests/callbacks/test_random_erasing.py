"""One rectangle of some pictures is filled; which, where and with what is the sample's own affair."""

import pytest
import torch

from lightning_cnn.callbacks import RandomErasing
from lightning_cnn.callbacks._batch_hook import Samples
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.batch import Batch


def erased(callback, index, dtype=torch.float32, size=(16, 12), epoch=0):
    image = torch.full((len(index), 3, *size), 2).to(dtype)  # no filling is 2: floats stay below 1, and 2/255 is drawn rarely
    return callback.transform(Batch(image, index, index), Samples(index, ("epoch", epoch))).image


def test_the_lost_part_is_one_rectangle_of_the_asked_area_in_p_of_the_pictures():
    n, size = 400, (16, 12)
    lost = (erased(RandomErasing(p=0.5, area=(0.1, 0.4), aspect=(0.5, 2.0), fill=0.0), torch.arange(n), size=size) == 0)[:, 0]
    hit = lost.flatten(1).any(1)
    assert hit.float().mean().item() == pytest.approx(0.5, abs=4.5 * (0.25 / n) ** 0.5)
    for picture in lost[hit]:
        rows, columns = picture.any(1), picture.any(0)
        assert torch.equal(picture, rows[:, None] & columns[None, :]), "a rectangle is the product of its shadows"
        height, width = rows.sum().item(), columns.sum().item()
        rounding = (height + width) / 2 + 0.25  # each side is off by half a pixel at most
        assert 0.1 * 192 - rounding <= height * width <= 0.4 * 192 + rounding
        assert (height - 0.5) / (width + 0.5) <= 2.0
        assert (height + 0.5) / (width - 0.5) >= 0.5 or width == size[1]


@pytest.mark.parametrize("fill", ["noise", 0.5])
def test_a_sample_loses_the_same_in_any_batch_of_its_epoch(fill):
    callback, order = RandomErasing(p=1.0, fill=fill), torch.randperm(32, generator=torch.Generator().manual_seed(0))
    whole = erased(callback, torch.arange(32))
    assert torch.equal(torch.cat([erased(callback, part) for part in order.split([5, 1, 26])]), whole[order])
    assert not torch.equal(erased(callback, torch.arange(32), epoch=1), whole)
    assert not torch.equal(erased(RandomErasing(p=1.0, fill=fill, seed=1), torch.arange(32)), whole)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64])
def test_type_and_layout_are_kept(dtype):
    index = torch.arange(8)
    image = torch.full((8, 3, 8, 8), 2).to(dtype).contiguous(memory_format=torch.channels_last)
    callback = RandomErasing(p=1.0, fill=1.0)
    result = callback.transform(Batch(image, index, index), Samples(index, ("epoch", 0))).image
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert sorted(result.unique().tolist()) == ([2, 255] if dtype == torch.uint8 else [1, 2])


def test_noise_fills_the_range_of_the_type():
    noise = erased(RandomErasing(p=1.0, area=(1.0, 1.0), aspect=(1.0, 1.0)), torch.arange(64), torch.uint8, size=(8, 8)).double()
    error = 255 / 12**0.5 / noise.numel() ** 0.5
    assert noise.mean().item() == pytest.approx(127.5, abs=4.5 * error)
    assert {noise.min().item(), noise.max().item()} == {0.0, 255.0}


def test_wrong_arguments_are_named_together():
    with pytest.raises(ConfigurationError, match="4 problems"):
        RandomErasing(p=2.0, area=(0.5, 0.1), aspect=(0.0, 1.0), fill="grey")


def test_masks_lose_the_same_rectangle_and_boxes_stay():
    index = torch.arange(8)
    batch = {"image": torch.full((8, 3, 16, 12), 2.0), "mask": torch.full((8, 16, 12), 7), "boxes": torch.rand(8, 2, 4)}
    callback = RandomErasing(p=1.0, fill=0.0, data_keys={"mask": "mask", "boxes": "bbox_xyxy"})
    result = callback.transform(batch, Samples(index, ("epoch", 0)))
    assert torch.equal(result["mask"] == 0, result["image"][:, 0] == 0) and (result["mask"] == 0).any()
    assert torch.equal(result["boxes"], batch["boxes"])
    with pytest.raises(ConfigurationError, match=r"'boxes' is 'box'"):
        RandomErasing(data_keys={"boxes": "box"})
