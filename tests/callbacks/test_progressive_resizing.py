"""Training pictures grow with the epochs, keep what they are, and are whole at the end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_cnn.callbacks import ProgressiveResizing
from lightning_cnn.callbacks._batch_hook import Samples
from lightning_cnn.errors import ConfigurationError
from lightning_cnn.functional.batch import Batch
from lightning_cnn.functional.resizing import resize, size_at
from lightning_cnn.model import Classifier

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Sizes(Classifier):
    def __init__(self):
        super().__init__(architecture="small_cnn", classes=["a", "b"], in_channels=1)
        self.sizes = []

    def training_step(self, batch, batch_idx):
        self.sizes.append(tuple(batch.image.shape[2:]))
        return super().training_step(batch, batch_idx)


def batch(n=2, size=(24, 32)):
    index = torch.arange(n)
    return Batch(torch.rand(n, 1, *size), index % 2, index)


def fit(*callbacks, **options):
    model = Sizes()
    trainer = Trainer(**{"accelerator": "cpu", "max_epochs": 5, **QUIET, **options}, callbacks=list(callbacks))
    trainer.fit(model, DataLoader([batch()], batch_size=None))
    return model.sizes


def test_pictures_grow_to_their_whole_size_over_the_epochs():
    sizes = fit(ProgressiveResizing(start=0.5, full_from=0.6))
    assert sizes == [(12, 16), (16, 20), (20, 28), (24, 32), (24, 32)]


@settings(max_examples=50, deadline=None)
@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), st.floats(0.01, 1), st.floats(0, 1), st.integers(1, 64), st.floats(0, 1))
def test_sizes_never_shrink_are_multiples_and_end_whole(size, start, full_from, multiple_px, progress):
    now, later = (size_at(at, size, start, full_from, multiple_px) for at in (progress, (1 + progress) / 2))
    assert all(1 <= a <= b <= whole for a, b, whole in zip(now, later, size, strict=True))
    assert all(a % multiple_px == 0 or a == whole for a, whole in zip(now, size, strict=True))
    assert size_at(1.0, size, start, full_from, multiple_px) == size


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_type_and_layout_are_kept_and_a_plain_picture_stays_plain(dtype):
    image = torch.full((2, 3, 8, 8), 200).to(dtype).contiguous(memory_format=torch.channels_last)
    small = resize(image, (4, 6))
    assert small.dtype == dtype
    assert small.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(small, torch.full((2, 3, 4, 6), 200).to(dtype))
    assert resize(image, (8, 8)) is image


def test_half_the_edge_is_the_mean_of_what_the_antialiasing_filter_covers():
    """A triangle of four pixels: weights 1, 3, 3, 1 of eighths (inside the picture)."""
    row = torch.arange(16.0).square()
    small = resize(row.expand(1, 1, 16, 16).clone(), (16, 8))[0, 0, 0]
    windows = row[1:].unfold(0, 4, 2)
    torch.testing.assert_close(small[1:-1], windows @ torch.tensor([1.0, 3, 3, 1]) / 8)


def test_what_cannot_work_is_refused_together():
    with pytest.raises(ConfigurationError, match="3 problems"):
        ProgressiveResizing(start=0.0, full_from=2.0, multiple_px=0)
    with pytest.raises(ConfigurationError, match="2 problems") as caught:
        fit(ProgressiveResizing(), ProgressiveResizing(), max_epochs=-1, max_steps=2)
    assert "Keep one" in str(caught.value)
    assert "max_epochs=-1" in str(caught.value)


def test_masks_boxes_and_keypoints_follow():
    """A white square stays where its mask, its boxes and its corners say."""
    image, mask = torch.zeros(1, 3, 16, 16), torch.zeros(1, 16, 16, dtype=torch.int64)
    image[:, :, 4:8, 8:12], mask[:, 4:8, 8:12] = 1, 5
    batch = {
        "image": image, "mask": mask, "corners": torch.tensor([[[7.5, 3.5, 11.5, 7.5]]]), "sized": torch.tensor([[[7.5, 3.5, 4.0, 4.0]]]),
        "points": torch.tensor([[[7.5, 3.5]]]),
    }  # fmt: skip
    keys = {"image": "input", "mask": "mask", "corners": "bbox_xyxy", "sized": "bbox_xywh", "points": "keypoints"}
    callback = ProgressiveResizing(start=0.5, data_keys=keys)
    result = callback.transform(batch, Samples(torch.arange(1), ("epoch", 0)))
    assert result["image"].shape == (1, 3, 8, 8) and result["image"][0, 0, 2:4, 4:6].mean() > 0.75
    assert torch.equal(result["mask"].nonzero(), (result["image"][:, 0] > 0.5).nonzero()) and result["mask"].max() == 5
    assert result["corners"].flatten().tolist() == [3.5, 1.5, 5.5, 3.5]
    assert result["sized"].flatten().tolist() == [3.5, 1.5, 2.0, 2.0]
    assert result["points"].flatten().tolist() == [3.5, 1.5]
