"""A network with every transfer trap in it, small enough to train in milliseconds."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


def run_two_processes(script: str, folder: Path) -> None:
    """Run a script whose Trainer starts a second process; `{tests}` in it stands for this folder, its argument is `folder`."""
    file = folder / "run.py"
    file.write_text(script.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PL_TORCH_DISTRIBUTED_BACKEND": "gloo"}
    command = [sys.executable, str(file), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "Error" in line)  # of every rank


def loader(n: int = 32, batch_size: int = 8, shuffle: bool = False) -> DataLoader:
    noise = torch.Generator().manual_seed(3)
    images = torch.randn(n, 3, 8, 8, generator=noise) * 2 + 5
    return DataLoader(TensorDataset(images, torch.arange(n) % 4), batch_size=batch_size, shuffle=shuffle)


class Net(nn.Sequential):
    """Three stages and a head; the norms of the last stage and of the head have equal width, hence equal values."""

    def __init__(self, dropout: float = 0.0):
        torch.manual_seed(0)
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.down = nn.MaxPool2d(2)
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout))
        self.down2 = nn.MaxPool2d(2)
        self.top = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 4)


class Module(L.LightningModule):
    def __init__(self, schedule=None, net=None, lr: float = 0.1, optimizer=torch.optim.SGD, **settings):
        super().__init__()
        self.model = net or Net()
        self.schedule, self.lr, self.optimizer, self.settings = schedule, lr, optimizer, settings

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=self.lr, **self.settings)
        return optimizer if self.schedule is None else ([optimizer], [self.schedule(optimizer)])


def fit(module, *callbacks, epochs: int = 2, data=None, val=None, ckpt_path=None, **settings):
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**QUIET, **settings})
    trainer.fit(module, loader() if data is None else data, val, ckpt_path=ckpt_path)
    return trainer


def weights(module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
