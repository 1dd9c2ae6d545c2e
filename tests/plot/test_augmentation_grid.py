"""The grid shows each picture as loaded and as training would see it."""

import numpy as np
import pytest
import torch

from lightning_cnn.callbacks import BatchAugmentation
from lightning_cnn.functional.batch import Batch
from lightning_cnn.plot import augmentation_grid


@pytest.mark.parametrize(("channels", "dtype"), [(1, torch.float32), (3, torch.uint8)])
def test_a_row_holds_the_picture_and_its_epochs(channels, dtype):
    image = torch.rand(2, channels, 8, 8)
    batch = Batch((image * 255).to(dtype) if dtype == torch.uint8 else image, torch.zeros(2), torch.arange(2))
    augmentation = BatchAugmentation(augment="affine")
    made = augmentation_grid(augmentation, batch, epochs=3)
    shown = [np.asarray(ax.images[0].get_array()).squeeze() for ax in made.axes]
    assert len(shown) == 2 * 4
    scale = 255 if dtype == torch.uint8 else 1
    expected = augmentation.at_epoch(batch, 2).image[1].movedim(0, -1).squeeze().float() / scale
    np.testing.assert_allclose(shown[0], image[0].movedim(0, -1).squeeze(), atol=1 / 255)
    np.testing.assert_allclose(shown[7], expected, atol=1e-6)
    assert made.axes[3].get_title() == "epoch 2"
