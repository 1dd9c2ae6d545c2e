"""Augmentation on the device of the batch: same noise for the same sample, same type of picture, no trace outside training."""

import pytest
import torch
from kornia import augmentation as K

from lightning_cnn.callbacks import BatchAugmentation
from lightning_cnn.callbacks._batch_hook import Samples
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.batch import Batch

HEAVY = [K.RandomHorizontalFlip(), K.RandomAffine(20.0, p=0.5), K.RandomGaussianNoise(p=0.5), K.RandomErasing(p=0.5)]


def batch_of(index, dtype=torch.float32):
    image = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))[index]
    return Batch((image * 255).to(dtype) if dtype == torch.uint8 else image.to(dtype), index % 3, index)


def augmented(callback, batch, epoch=0):
    return callback.transform(batch, Samples(batch.index, ("epoch", epoch)))


def test_a_flip_flips_half_of_the_pictures_and_nothing_else():
    batch = batch_of(torch.arange(32))
    result = augmented(BatchAugmentation(augment="flip"), batch)
    flipped = [torch.equal(new, old.flip(-1)) for new, old in zip(result.image, batch.image, strict=True)]
    kept = [torch.equal(new, old) for new, old in zip(result.image, batch.image, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 6 <= sum(flipped) <= 26  # 16 +- 3.5 standard errors of 2.83
    assert torch.equal(result.label, batch.label)


@pytest.mark.parametrize(
    "augment", ["flip", HEAVY, K.AugmentationSequential(*HEAVY, data_keys=["input"])], ids=["word", "list", "container"]
)
def test_a_sample_looks_the_same_in_any_batch_of_its_epoch(augment):
    callback = BatchAugmentation(augment=augment, seed=3)
    order = torch.randperm(32)
    whole = augmented(callback, batch_of(torch.arange(32))).image
    parts = torch.cat([augmented(callback, batch_of(part)).image for part in order.split([5, 1, 26])])
    assert torch.equal(parts, whole[order])
    assert not torch.equal(augmented(callback, batch_of(torch.arange(32)), epoch=1).image, whole)
    assert not torch.equal(augmented(BatchAugmentation(augment=augment, seed=4), batch_of(torch.arange(32))).image, whole)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_type_and_layout_are_kept_and_agree_with_float(dtype, layout):
    callback, index = BatchAugmentation(augment=HEAVY), torch.arange(32)
    batch = batch_of(index, dtype)
    result = augmented(callback, batch.replace(image=batch.image.contiguous(memory_format=layout))).image
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=layout)
    exact = batch.image.float() / (255 if dtype == torch.uint8 else 1)
    reference = augmented(callback, batch.replace(image=exact)).image
    got = result.float() / (255 if dtype == torch.uint8 else 1)
    half_a_step = 0.5 / 255 if dtype == torch.uint8 else torch.finfo(dtype).eps * reference.abs().max().item()
    bound = half_a_step + 1e-6
    outside = (reference < 0) | (reference > 1)
    assert ((got - reference).abs() <= bound)[~(outside & (dtype == torch.uint8))].all()


def test_masks_boxes_and_keypoints_follow_the_picture():
    mask = (torch.arange(8).expand(4, 1, 8, 8) < 3).long()
    boxes = torch.tensor([[[0.0, 1.0, 3.0, 4.0]]]).repeat(4, 1, 1)
    points = torch.tensor([[[2.0, 5.0]]]).repeat(4, 1, 1)
    batch = {"image": mask.float().repeat(1, 3, 1, 1), "mask": mask, "boxes": boxes, "points": points, "label": torch.arange(4)}
    keys = {"image": "input", "mask": "mask", "boxes": "bbox_xyxy", "points": "keypoints"}
    callback = BatchAugmentation(augment=K.RandomHorizontalFlip(p=1.0), data_keys=keys)
    result = callback.transform(batch, Samples(torch.arange(4), ("epoch", 0)))
    assert result["mask"].dtype == torch.int64
    assert torch.equal(result["mask"], mask.flip(-1))
    assert torch.equal(result["image"][:, :1], result["mask"].float())
    assert torch.equal(result["boxes"], torch.tensor([[[4.0, 1.0, 7.0, 4.0]]]).repeat(4, 1, 1)), "Kornia's boxes hold pixel centres"
    assert torch.equal(result["points"], torch.tensor([[[5.0, 5.0]]]).repeat(4, 1, 1))
    assert torch.equal(batch["mask"], mask), "the loader's batch is left as it was"


def test_every_wrong_word_is_named_in_one_error():
    with pytest.raises(ConfigurationError, match="3 problems") as caught:
        BatchAugmentation(augment=["flap", "flip", "zzz", 3])
    assert "'flap'. Did you mean 'flip'?" in str(caught.value)
    assert "got 3 of type int" in str(caught.value)
