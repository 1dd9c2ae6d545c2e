"""`python pipeline_job.py OUT`: a real network trained under every schedule of Pipeline by two processes; results are written to OUT.

As a module: `run(strategy, devices, ...)` is one such training, which the tests repeat in one process.
"""

import faulthandler
import logging
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

torch.set_num_threads(1)
BF16 = {"precision": "bf16-mixed", "dtype": torch.float32}
SCHEDULES = ["gpipe", "1f1b", "interleaved", "zb"]


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3, norm_layer=lambda c: nn.GroupNorm(8, c))
        self.net.layer3, self.net.layer4, self.net.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 3)
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def training_step(self, batch, batch_idx):
        answer = self.net(batch[0] / 2)
        loss = F.cross_entropy(answer, batch[1])
        self.accuracy(answer, batch[1])
        self.log("train_accuracy", self.accuracy, on_epoch=True, on_step=False)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self.all_gather(self.net(batch[0]).softmax(-1))  # nothing to add: everybody has seen the same pictures

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def run(strategy, devices, out, *, epochs=1, resume=None, dtype=torch.float64, **kwargs):
    torch.set_default_dtype(dtype)
    torch.manual_seed(3)
    data = TensorDataset(torch.randn(27, 3, 24, 24), torch.arange(27) % 3)
    loader = DataLoader(data, batch_size=8)  # the last batch has three pictures: fewer than micro-batches
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        **{"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, **kwargs},
    )
    model = Net()
    trainer.fit(model, loader, loader, ckpt_path=resume)
    facts = {"metrics": {k: float(v) for k, v in trainer.callback_metrics.items()}, "weights": digest(model)}
    trainer.save_checkpoint(out)
    facts["test"] = trainer.test(model, loader, verbose=False)[0]["test_loss"]
    facts["predict"] = torch.cat(trainer.predict(model, loader))
    facts["cuts"] = getattr(trainer.strategy, "_cuts", [])
    return facts


def digest(model):
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def main():
    faulthandler.dump_traceback_later(120, exit=True)
    from lightning_cnn.strategy import Pipeline

    out = Path(sys.argv[1])
    for schedule in sys.argv[2:] or SCHEDULES:
        strategy = Pipeline(schedule=schedule, micro_batches=4)
        facts = run(strategy, 2, out / f"{schedule}.ckpt")
        torch.save(facts, out / f"{schedule}-{strategy.global_rank}.pt")
    if len(sys.argv) == 2:
        facts = run(Pipeline(stages=["layer2"]), 2, out / "resumed.ckpt", epochs=2, resume=out / "alone.ckpt")
        torch.save(facts, out / f"resumed-{strategy.global_rank}.pt")
        facts = run(Pipeline(), 2, out / "bf16.ckpt", **BF16)
        torch.save(facts, out / f"bf16-{strategy.global_rank}.pt")


if __name__ == "__main__":
    main()
