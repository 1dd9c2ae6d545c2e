"""Every word of the menu works, repeats itself for a sample, and has its entry in conf/augment."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_cnn.functional.keyed_random import KeyedRandom
from lightning_cnn.nn.augment_menu import MENU, operations

CONF = Path(__file__).parents[2] / "conf" / "augment"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("word", MENU)
def test_a_word_changes_pictures_within_their_range_and_repeats_itself(word, channels):
    image = torch.rand(48, channels, 16, 16, generator=torch.Generator().manual_seed(0))

    def augmented(index):
        result = image[index]
        with KeyedRandom(7, index):
            for step in operations(word):
                result = step(result)
        return result

    whole = augmented(torch.arange(48))
    assert whole.shape == image.shape
    assert 0 <= whole.min() and whole.max() <= 1
    assert not torch.equal(whole, image)
    torch.testing.assert_close(augmented(torch.tensor([5, 40, 2])), whole[[5, 40, 2]], rtol=0, atol=1e-5)


def test_the_menu_of_the_command_line_is_the_menu():
    entries = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")}
    assert entries.pop("none") is None
    assert {word: entry["augment"] for word, entry in entries.items()} == {word: word for word in MENU}
    assert {entry["_target_"] for entry in entries.values()} == {"lightning_cnn.callbacks.BatchAugmentation"}
