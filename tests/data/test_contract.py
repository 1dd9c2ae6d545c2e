"""What every LightningDataModule of `data` keeps: one table, one set of promises.

Every sample once an epoch, on any number of ranks; the same order and the same noise for any number of workers; pixels equal to the
reference; resumable inside an epoch, to the bit, through the Trainer's own checkpoints.
"""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lightning_cnn.data import DALIFolder, Digits, ImageFolders, Letters, PackedDataModule, pack
from lightning_cnn.functional.batch import Batch

SAMPLES, SIDE, SHARDS = 22, 16, 4
ROOM_GB = 2 * -(-SAMPLES // SHARDS) * SIDE * SIDE * 3 / 1e9  # two shards of four
FILES = [index for label in range(2) for index in range(label, SAMPLES, 2)]  # as a folder is read


def picture(index):
    return np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for index in range(SAMPLES):
        for split in ("train", "val"):
            place = root / "pictures" / split / f"c{index % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(index)).save(place / f"{index:02d}.png")
    pack(root / "pictures" / "train", root / "raw.pack", size=None, progress=False, workers=0)
    pack(root / "pictures" / "train", root / "jpeg.pack", size=None, codec="jpeg", progress=False, workers=0)
    pack(root / "pictures" / "train", root / "shard.pack", size=None, shards=SHARDS, progress=False, workers=0)
    return root


def packed(lane, codec="raw", **fixed):
    def make(root, batch_size, workers):
        files = {"train": root / f"{codec}.pack", "val": root / f"{codec}.pack"}
        return PackedDataModule(**files, lane=lane, batch_size=batch_size, threads=max(workers, 1), seed=1, **fixed)

    return make


def at_url(lane, **fixed):
    """Shards at a URL, of which the local disk holds two at a time unless the order needs all."""
    small = {"order": "windowed", "window": 1, "cache_gb": ROOM_GB}

    def make(root, batch_size, workers):
        options = {"cache_folder": root / "cache", **small, **fixed}
        url = f"file://{root}/shard-*.pack"
        return PackedDataModule(train=url, lane=lane, batch_size=batch_size, threads=max(workers, 1), seed=1, **options)

    return make


def folders(root, batch_size, workers):
    return ImageFolders(root=str(root / "pictures"), size_px=SIDE, batch_size=batch_size, num_workers=workers, seed=1)


def dali_folder(root, batch_size, workers):
    options = {"crop": "center", "central": 1.0, "flip": 0.0, "dtype": "uint8", "size_px": SIDE}
    return DALIFolder(root=str(root / "pictures"), batch_size=batch_size, threads=max(workers, 1), seed=1, **options)


# name: make(root, batch_size, workers), and whether training pictures are the stored ones (else they are augmented)
TABLE = {
    "packed, gather": (packed("gather"), True),
    "packed, gather, jpeg": (packed("gather", "jpeg"), False),
    "packed, fused": (packed("fused"), False),
    "packed, fused, jpeg": (packed("fused", "jpeg"), False),
    "packed, fused, padded": (packed("fused", crop="padded"), False),
    "packed, fused, whole": (packed("fused", crop="center", flip=0.0, dtype="uint8"), True),
    "packed, dali": (packed("dali"), False),
    "packed, dali, jpeg": (packed("dali", "jpeg"), False),
    "packed, dali, whole": (packed("dali", crop="center", flip=0.0, dtype="uint8"), True),
    "packed, device": (packed("auto", cache="device"), True),
    "packed at a URL, gather": (at_url("gather"), True),
    "packed at a URL, gather, shuffled": (at_url("gather", order="shuffled", cache_gb=2 * ROOM_GB), True),
    "packed at a URL, fused": (at_url("fused"), False),
    "packed at a URL, dali": (at_url("dali"), False),
    "packed at a URL, device": (at_url("auto", cache="device", order="shuffled"), True),
    "dali_folder": (dali_folder, True),
    "image_folders": (folders, True),
    "digits": (lambda root, batch_size, workers: Digits(shots=3, batch_size=batch_size, seed=1), False),
    "letters": (lambda root, batch_size, workers: Letters(batch_size=batch_size, seed=1), False),
}
every_module = pytest.mark.parametrize("name", TABLE)


def made(name, root, batch_size=4, workers=0):
    module = TABLE[name][0](root, batch_size, workers)
    module.prepare_data()
    module.setup("fit")
    return module


def epochs_of(name, root, count=1, **options):
    loader = made(name, root, **options).train_dataloader()
    return [{int(i): image for b in loader for i, image in zip(b.index, b.image.clone(), strict=True)} for _ in range(count)]


@every_module
def test_a_batch_knows_its_samples_and_an_epoch_holds_each_once(name, folder):
    loader = made(name, folder).train_dataloader()
    batches = list(loader)
    assert all(isinstance(batch, Batch) and len(batch.image) == len(batch.label) == len(batch.index) for batch in batches)
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(loader.order.samples))
    assert len(batches) == len(loader)


@every_module
def test_every_rank_gets_its_share_and_none_a_second_time(name, folder):
    seen, lengths = [], set()
    for rank in range(3):
        loader = made(name, folder).train_dataloader()
        loader.order.rank, loader.order.num_replicas = rank, 3
        seen += [int(i) for batch in loader for i in batch.index]
        lengths.add(len(loader))
    assert sorted(seen) == list(range(loader.order.samples))
    assert len(lengths) == 1


@every_module
def test_workers_and_ranks_change_neither_order_nor_pixels(name, folder):
    (one,), (more,) = epochs_of(name, folder), epochs_of(name, folder, workers=2)
    assert list(one) == list(more)
    assert all(torch.equal(one[i], more[i]) for i in one)
    loader = made(name, folder, batch_size=2).train_dataloader()
    loader.order.rank, loader.order.num_replicas = 1, 2
    for batch in loader:
        assert all(torch.equal(image, one[int(i)]) for i, image in zip(batch.index, batch.image, strict=True))


@every_module
def test_the_next_epoch_has_another_order(name, folder):
    first, second = epochs_of(name, folder, 2)
    assert list(first) != list(second)


@pytest.mark.parametrize("name", [name for name, (_, stored) in TABLE.items() if stored])
def test_pixels_are_the_stored_ones(name, folder):
    (got,) = epochs_of(name, folder)
    assert all(np.array_equal(got[i].permute(1, 2, 0).numpy(), picture(file)) for i, file in enumerate(FILES))


QUIET = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.losses = torch.nn.LazyLinear(40), []

    def training_step(self, batch, batch_index):
        image = batch.image.float() / (255 if batch.image.dtype == torch.uint8 else 1)
        loss = F.cross_entropy(self.layer(image.flatten(1)), batch.label)
        self.losses.append((batch.index.tolist(), float(loss.detach())))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class SaveAt(L.Callback):
    def __init__(self, steps, folder):
        self.steps, self.folder = steps, folder

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(name, root, ckpt_path=None, callbacks=()):
    torch.manual_seed(0)
    model, module = Net(), made(name, root)
    with torch.no_grad():
        image = next(iter(made(name, root).train_dataloader())).image
        model.layer(image.flatten(1).float())
    L.Trainer(**QUIET, max_epochs=2, limit_val_batches=0, callbacks=list(callbacks)).fit(model, datamodule=module, ckpt_path=ckpt_path)
    return model.losses, len(module.train_dataloader())


@every_module
def test_a_resumed_run_is_the_uninterrupted_one(name, folder, tmp_path):
    """Interrupted inside an epoch, and on its last batch."""
    steps = len(made(name, folder).train_dataloader())
    saved = (steps // 2, steps)
    whole, _ = fit(name, folder, callbacks=[SaveAt(saved, tmp_path)])
    for step in saved:
        assert fit(name, folder, ckpt_path=tmp_path / f"{step}.ckpt")[0] == whole[step:]


@pytest.mark.forks
def test_two_processes_share_an_epoch_and_each_has_its_own_cache(folder, tmp_path):
    """Even when the files were opened before the processes were forked: they would drop each other's shards."""

    class Written(Net):
        def training_step(self, batch, batch_index):
            stored = [torch.from_numpy(picture(FILES[index])).permute(2, 0, 1) for index in batch.index]
            self.seen.append((self.current_epoch, batch.index.tolist(), torch.equal(batch.image, torch.stack(stored))))
            return super().training_step(batch, batch_index)

        def on_train_end(self):
            torch.save(self.seen, tmp_path / f"{self.global_rank}.pt")

    for name, options in {"gather": {}, "device": {"cache": "device"}}.items():
        module, model = at_url("gather", cache_folder=tmp_path / name, **options)(folder, 3, 1), Written()
        model.seen = []
        module.setup("fit")
        with torch.no_grad():
            model.layer(torch.zeros(1, SIDE * SIDE * 3))
        L.Trainer(**QUIET, max_epochs=2, limit_val_batches=0, devices=2, strategy="ddp_fork").fit(model, datamodule=module)
        ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
        for epoch in range(2):
            seen = [index for rank in ranks for entry in rank if entry[0] == epoch for index in entry[1]]
            assert sorted(seen) == list(range(SAMPLES)), name
        assert all(entry[2] for rank in ranks for entry in rank), name
        assert len(list((tmp_path / name).iterdir())) == 3, name  # of this process and of both ranks
