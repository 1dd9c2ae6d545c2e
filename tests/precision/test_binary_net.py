"""BinaryNet: the 1-bit recipes learn, on one process and on two."""

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cnn.precision import BinaryNet, LowBit, bi_real, binary_connect, xnor_net


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def digits():
    x, y = load_digits(return_X_y=True)
    data = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(y)
    return [tuple(t[a:b] for t in data) for a, b in ((0, 1200), (1200, 1797))]


def trainer(plugin, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", plugins=[plugin], **quiet, **options)


@pytest.mark.parametrize("recipe", [BinaryNet, binary_connect, xnor_net, bi_real])
def test_every_recipe_learns_digits(recipe):
    """Four epochs reach 80 %; chance is 10 %."""
    (x, y), (x_test, y_test) = digits()
    net = Digits()
    generator = torch.Generator().manual_seed(0)
    trainer(recipe(), max_epochs=4).fit(net, DataLoader(TensorDataset(x, y), 50, shuffle=True, generator=generator))
    assert any(hasattr(m, "bits") for m in net.modules())
    assert (net.eval().net(x_test).argmax(1) == y_test).float().mean() > 0.8


@pytest.mark.forks
def test_two_ranks_hold_the_same_weights():
    """After 6 steps of DDP on different data, the largest difference between the ranks is exactly 0."""
    (x, y), _ = digits()
    spread = Spread()
    trainer(BinaryNet(), max_steps=6, strategy="ddp_fork", devices=2, callbacks=[spread]).fit(
        Digits(), DataLoader(TensorDataset(x[:200], y[:200]), 16)
    )


class Spread(L.Callback):
    """Raises in the rank, and so in the test, unless all ranks agree and the binarised layers have learned."""

    def on_train_start(self, trainer, pl_module):
        self.start = pl_module.net[3].weight.detach().clone()

    def on_train_end(self, trainer, pl_module):
        flat = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        ranks = trainer.strategy.all_gather(flat)
        assert ranks.shape[0] == 2
        assert (ranks[0] - ranks[1]).abs().max() == 0
        assert not torch.equal(pl_module.net[3].weight, self.start)


def test_binary_net_is_low_bit_of_one_bit():
    assert BinaryNet(ste="approx").bits == LowBit(weights=1, activations=1, ste="approx").bits
    assert BinaryNet(activations=False).bits == LowBit(weights=1, activations=None).bits
    assert bi_real(skip=("a",)).skip == ("a",)
    assert binary_connect().keep == ()
