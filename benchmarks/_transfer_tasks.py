"""What the transfer benchmark trains: pictures and networks, a module, and a clock that stops while it looks at the validation set."""

import time
from pathlib import Path

import lightning as L
import torch
import torchvision
import torchvision.transforms.v2 as v2
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_cnn.nn.probe import LinearForm
from lightning_cnn.nn.transfer_head import MeanMaxPool, Standardise, head_probe, start_head

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Pictures(Dataset):
    """uint8 pictures in memory; `flip` mirrors each at random."""

    def __init__(self, images, labels, flip=False):
        self.images, self.labels, self.flip = images, labels, flip

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = (self.images[i].float() / 255 - MEAN) / STD
        return (image.flip(-1) if self.flip and torch.rand(()) < 0.5 else image), self.labels[i]


class Finetune(L.LightningModule):
    """`network` is (backbone, head)."""

    def __init__(self, network, lr):
        super().__init__()
        self.backbone, self.head = network
        self.lr = lr

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-2)
        steps = max(2, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), "interval": "step"}]


class HeadOnly(Finetune):
    """What BackboneFinetuning's documentation asks for: an optimizer of the head, constant learning rate."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.head.parameters(), lr=self.lr, weight_decay=1e-2)


class Clock(Callback):
    """Seconds of training, and validation accuracy at the end of every `every`-th epoch, outside of that time."""

    def __init__(self, val, every):
        self.val, self.every, self.spent, self.seen = val, every, 0.0, []

    def on_train_epoch_start(self, trainer, pl_module):
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        self.spent += time.perf_counter() - self.start
        if (trainer.current_epoch + 1) % self.every == 0 or trainer.current_epoch + 1 == trainer.max_epochs:
            self.seen.append((self.spent, accuracy(pl_module, self.val)))

    def until(self, target):
        return next((spent for spent, reached in self.seen if reached >= target), None)


@torch.no_grad()
def accuracy(module, val):
    modes = {m: m.training for m in module.modules()}
    module.eval()
    right = sum(int((module(image).argmax(-1) == label).sum()) for image, label in DataLoader(val, 50))
    for m, training in modes.items():
        m.training = training
    return right / len(val)


def fit(module, callbacks, train, val, *, epochs, every=1):
    clock = Clock(val, every)
    L.Trainer(max_epochs=epochs, callbacks=[*callbacks, clock], **QUIET).fit(
        module, DataLoader(train, min(32, len(train)), shuffle=True)
    )
    return clock


class Task:
    """Pictures of a folder and a torchvision network with weights, or digits and a network that has read other digits."""

    def __init__(self, args):
        self.px, self.args, self.fitted = args.px, args, None
        self.train, self.val = self._folder(args) if args.root else self._digits()
        self.classes = int(self.train[1].max()) + 1

    def backbone(self, pretrained=True):
        """Feature maps, and how many."""
        if not self.args.root:
            net = small_body()
            if pretrained:
                net.load_state_dict(self.source)
            return net, 64
        net = getattr(torchvision.models, self.args.model)(weights=None)
        if pretrained:
            net.load_state_dict(torch.load(self.args.weights, weights_only=True))
        body = net.features if hasattr(net, "features") else nn.Sequential(*list(net.children())[:-2])
        with torch.no_grad():
            width = body.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        return body.train(), width

    def network(self, started=False):
        """Features, and a linear layer on their standardised mean and maximum, which starts at zero or as a fitted probe.

        Without the standardisation SqueezeNet's pooled features reach 1,000, and the stock methods ended far below a probe.
        """
        body, width = self.backbone()
        network = body, nn.Sequential(MeanMaxPool(), Standardise(2 * width), nn.Linear(2 * width, self.classes))
        probe, _ = self.probe()
        start_head(nn.Sequential(*network), probe)
        if not started:
            nn.init.zeros_(network[1][2].weight)
            nn.init.zeros_(network[1][2].bias)
        return network

    def probe(self):
        """A linear classifier fitted to the pooled features of the training pictures, and the seconds it took."""
        file = Path(self.args.folder) / f"probe_{self.px}.pt" if self.args.folder else None
        if self.fitted is None and file and file.exists():
            parts, spent = torch.load(file, weights_only=True)
            self.fitted = LinearForm(tuple(parts.pop("classes")), **parts), spent
        if self.fitted is None:
            body, width = self.backbone()
            head = nn.Sequential(MeanMaxPool(), Standardise(2 * width), nn.Linear(2 * width, self.classes))
            start = time.perf_counter()
            self.fitted = head_probe(nn.Sequential(body, head), DataLoader(Pictures(*self.train), 32)), time.perf_counter() - start
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save((vars(self.fitted[0]), self.fitted[1]), file)
        return self.fitted

    def _folder(self, args):
        resize, crop = v2.Resize(args.px, antialias=True), v2.CenterCrop(args.px)

        def read(split):
            data = torchvision.datasets.ImageFolder(f"{args.root}/{split}")
            images = [crop(resize(v2.functional.pil_to_tensor(image.convert("RGB")))) for image, _ in data]
            return torch.stack(images), torch.tensor(data.targets)

        return read("train"), read("val")

    def _digits(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images / 16 * 255, dtype=torch.uint8)[:, None].expand(-1, 3, -1, -1)
        images, labels = nn.functional.interpolate(images.float(), size=16).byte(), torch.tensor(digits.target)
        low, high = labels < 5, labels >= 5
        torch.manual_seed(0)
        body = small_body()
        module = Finetune((body, nn.Sequential(MeanMaxPool(), nn.Linear(128, 5))), 3e-3)
        fit(module, [], Pictures(images[low], labels[low]), Pictures(images[low], labels[low]), epochs=5, every=5)
        self.source = body.state_dict()
        images, labels = images[high], labels[high] - 5
        return (images[300:], labels[300:]), (images[:300], labels[:300])


def small_body():
    conv = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    conv += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*conv, nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())


def smaller(images, px):
    return (
        images if images.shape[-1] <= px else nn.functional.interpolate(images.float(), size=px, mode="bilinear", antialias=True).byte()
    )
