"""The prefix runs once a sample; everything else is bit for bit the run without the cache."""

import logging
import random

import lightning as L
import numpy as np
import pytest
import torch
from _transfer import Module, Net, fit, loader, same, weights
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_cnn.callbacks import DiscriminativeLR, FeatureCache, FrozenBatchNorm, GradualUnfreezing
from lightning_cnn.data import Resumable
from lightning_cnn.errors import ConfigurationError, UnsupportedLayerError


class Passes(Callback):
    """How often the first convolution ran, an epoch."""

    def __init__(self):
        self.counts = []

    def on_train_start(self, trainer, pl_module):
        def count(*_):
            self.counts[-1] += 1

        self.handle = next(m for m in pl_module.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(count)

    def on_train_epoch_start(self, trainer, pl_module):
        self.counts.append(0)


class Loads(Dataset):
    """Counts what is loaded; `shift` makes the transform random."""

    def __init__(self, n=32, shift=None):
        self.images, self.labels, self.shift, self.loaded = *loader(n).dataset.tensors, shift, 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        self.loaded += 1
        return self.images[i] + (self.shift() if self.shift else 0), self.labels[i]


def run(*callbacks, net=None, data=None, epochs=4, seed=5, module=None, **settings):
    module = module or Module(net=net, momentum=0.9)
    torch.manual_seed(seed)
    fit(module, *callbacks, epochs=epochs, data=loader(shuffle=True) if data is None else data, **settings)
    return module, torch.get_rng_state()


def frozen():
    return GradualUnfreezing(up_to=1)


class HeadDropout(Net):
    """Random numbers are drawn behind the prefix."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 4))


@pytest.mark.parametrize(
    "data",
    [
        lambda: loader(32, shuffle=True),
        lambda: loader(30, shuffle=True),
        lambda: DataLoader(loader(30).dataset, batch_size=8, shuffle=True, drop_last=True),
        lambda: DataLoader(loader(30).dataset, batch_size=8, shuffle=True, num_workers=2),
    ],
    ids=["even", "last batch smaller", "drop last", "workers"],
)
@pytest.mark.parametrize("net", [Net, HeadDropout])
def test_weights_and_random_state_are_bit_identical(net, data):
    plain, plain_state = run(frozen(), net=net(), data=data())
    passes = Passes()
    cached, cached_state = run(frozen(), FeatureCache(), passes, net=net(), data=data())
    assert same(weights(plain), weights(cached))
    assert torch.equal(plain_state, cached_state)
    assert passes.counts[0] > 0 and passes.counts[-1] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_this_packages_loaders_are_bit_identical_too_and_resume_inside_an_epoch(workers, tmp_path):
    def data():
        return Resumable(loader(30).dataset, batch_size=8, num_workers=workers)

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "6.ckpt")

    passes = Passes()
    plain, _ = run(frozen(), data=data())
    cached, _ = run(frozen(), FeatureCache(), passes, Save(), data=data())
    resumed, _ = run(frozen(), FeatureCache(), data=data(), ckpt_path=tmp_path / "6.ckpt")
    assert same(weights(plain), weights(cached)) and same(weights(plain), weights(resumed))
    assert [count > 0 for count in passes.counts] == [True, False, False, False]


def test_nothing_is_loaded_once_everything_is_stored():
    data = Loads()
    counts = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            counts.append(data.loaded)

    run(frozen(), FeatureCache(), Count(), data=DataLoader(data, batch_size=8, shuffle=True))
    assert counts[0] >= 32 and len(set(counts)) == 1


def test_validation_sees_pictures_and_the_whole_network():
    def metrics(*callbacks):
        module = Module(net=Net(), momentum=0.9)
        torch.manual_seed(0)
        return fit(module, *callbacks, epochs=3, data=loader(shuffle=True), val=loader(8)).callback_metrics["val/loss"]

    assert torch.equal(metrics(frozen()), metrics(frozen(), FeatureCache()))


def test_gradual_unfreezing_moves_the_prefix_and_stays_bit_identical():
    def settings():
        return [GradualUnfreezing(every=2), DiscriminativeLR()]

    plain, _ = run(*settings(), epochs=8)
    passes = Passes()
    cached, _ = run(*settings(), FeatureCache(), passes, epochs=8)
    assert same(weights(plain), weights(cached))
    assert [count > 0 for count in passes.counts] == [True, False, True, False, True, False, True, True]


def test_resumed_at_every_epoch_is_bit_identical(tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole, _ = run(frozen(), FeatureCache(), Save(), data=loader())
    for epoch in range(3):
        resumed, _ = run(frozen(), FeatureCache(), data=loader(), ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert same(weights(whole), weights(resumed)), epoch


def test_a_folder_is_reused_by_the_next_run_and_not_after_a_change(tmp_path):
    def epochs_with_passes(net=None, data=None):
        passes = Passes()
        module, _ = run(frozen(), FeatureCache(folder=str(tmp_path)), passes, net=net or Net(), data=data)
        return [count > 0 for count in passes.counts], module

    first, reference = epochs_with_passes()
    again, module = epochs_with_passes()
    assert first == [True, False, False, False] and again == [False] * 4
    assert same(weights(reference), weights(module))
    other = Net()
    with torch.no_grad():
        other.stem[0].weight[0, 0, 0, 0] += 1e-3
    assert epochs_with_passes(net=other)[0][0]
    images, labels = loader().dataset.tensors
    changed = TensorDataset(images + (torch.arange(32) == 7).view(-1, 1, 1, 1), labels)
    assert epochs_with_passes(data=DataLoader(changed, batch_size=8))[0][0]


def test_a_damaged_row_is_computed_again(tmp_path):
    reference, _ = run(frozen(), FeatureCache(folder=str(tmp_path)))
    file = next(tmp_path.glob("*/0.bin"))
    content = bytearray(file.read_bytes())
    content[5] ^= 4
    file.write_bytes(content)
    passes = Passes()
    module, _ = run(frozen(), FeatureCache(folder=str(tmp_path)), passes)
    assert passes.counts[0] == 1  # the one batch that holds it
    assert same(weights(reference), weights(module))


def test_views_keep_that_many_versions_of_each_picture():
    def noise():
        return torch.randn(()).item()

    data = DataLoader(Loads(shift=noise), batch_size=8)
    with pytest.raises(ConfigurationError, match=r"transformed at random.*views=k"):
        run(frozen(), FeatureCache(), data=data)
    passes = Passes()
    run(frozen(), FeatureCache(views=2), passes, data=data, epochs=5)
    assert [count > 0 for count in passes.counts] == [True, True, False, False, False]


@pytest.mark.parametrize("generator", [lambda: random.random(), lambda: float(np.random.rand())], ids=["random", "numpy"])
def test_any_source_of_randomness_in_the_data_is_found(generator):
    with pytest.raises(ConfigurationError, match="transformed at random"):
        run(frozen(), FeatureCache(), data=DataLoader(Loads(shift=generator), batch_size=8))


class HandFrozen(Callback):
    def setup(self, trainer, pl_module, stage):
        pl_module.requires_grad_(False)
        pl_module.model.fc.requires_grad_(True)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (lambda: Net(), r"'model\.stem\.1' \(BatchNorm2d\) is frozen but in training mode"),
        (lambda: Net(dropout=0.5), r"(?s)'model\.stem\.1' .*'model\.body\.3' \(Dropout\) is in training mode, so the prefix is random"),
    ],
)
def test_a_prefix_in_training_mode_is_refused_with_the_reason(net, reason):
    with pytest.raises(UnsupportedLayerError, match=reason):
        run(HandFrozen(), FeatureCache(), net=net())


def test_frozen_batch_norm_makes_a_hand_frozen_prefix_fit():
    plain, _ = run(HandFrozen(), FrozenBatchNorm())
    cached, _ = run(HandFrozen(), FrozenBatchNorm(), FeatureCache())
    assert same(weights(plain), weights(cached))


def test_nothing_frozen_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"the first layer, 'model\.stem.*is trainable"):
        run(FeatureCache())


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Skips(nn.Module):
    """The classifier looks past the frozen part at the picture."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(11, 4)

    def forward(self, x):
        return self.fc(torch.cat([self.body(x), x.mean((2, 3))], 1))


def test_a_network_that_draws_random_numbers_on_its_own_is_found():
    net = Net()
    net.down2 = nn.Sequential(nn.MaxPool2d(2), Noisy())
    with pytest.raises(UnsupportedLayerError, match="draws random numbers"):
        run(frozen(), FeatureCache(), net=net)


def test_a_skip_connection_past_the_prefix_is_found():
    with pytest.raises(UnsupportedLayerError, match="looks past it"):
        run(frozen(), FeatureCache(), net=Skips())


def test_streams_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(loader().dataset)

    with pytest.raises(ConfigurationError, match="Stream streams"):
        run(frozen(), FeatureCache(), data=DataLoader(Stream(), batch_size=8))


def test_batches_with_more_than_tensors_are_refused():
    class Named(Loads):
        def __getitem__(self, i):
            return *super().__getitem__(i), f"picture {i}"

    with pytest.raises(ValueError, match="holds str"):
        run(frozen(), FeatureCache(), data=DataLoader(Named(), batch_size=8))


def test_unfreezing_behind_its_back_is_refused():
    class Unfreezes(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.model.top.requires_grad_(True)

    with pytest.raises(ConfigurationError, match="list FeatureCache after"):
        run(frozen(), FeatureCache(), Unfreezes())


def test_too_much_for_memory_is_refused_with_what_to_do():
    with pytest.raises(ConfigurationError, match=r"more than memory_gib=9.*folder="):
        run(frozen(), FeatureCache(memory_gib=1e-9))


def test_everything_is_undone(caplog):
    class Breaks(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.trainer = trainer
            if trainer.current_epoch == 1:
                raise RuntimeError("stop")

    module, breaks = Module(), Breaks()
    with caplog.at_level(logging.INFO, "lightning_cnn"), pytest.raises(RuntimeError, match="stop"):
        run(frozen(), FeatureCache(), breaks, module=module)
    assert not any("forward" in vars(part) for part in module.modules())
    assert "batch_to_device" not in vars(breaks.trainer.strategy)
    assert "dataloader" not in vars(breaks.trainer.fit_loop._data_source)
    assert "'model.stem' to 'model.norm' runs once a sample" in caplog.text


def test_two_runs_with_one_callback_do_not_mix():
    cache = FeatureCache()
    first, _ = run(frozen(), cache)
    second, _ = run(frozen(), cache, seed=6)
    plain, _ = run(frozen(), seed=6)
    assert not same(weights(first), weights(second))
    assert same(weights(plain), weights(second))


def test_a_datamodule_and_accumulated_gradients_and_limits_change_nothing():
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader(40, shuffle=True)

    def go(*callbacks):
        module = Module(momentum=0.9)
        torch.manual_seed(1)
        trainer = L.Trainer(
            max_epochs=4, callbacks=[frozen(), *callbacks], accumulate_grad_batches=2, limit_train_batches=3, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(module, datamodule=Data())
        return weights(module)

    assert same(go(), go(FeatureCache()))
