"""`cache="device"`: refused before anything is allocated where it has no room, and held once."""

import lightning as L
import pytest
import torch

from lightning_cnn.data import PackedDataModule, _resident, pack
from lightning_cnn.data._resident import available_ram, free_bytes, require_room
from lightning_cnn.errors import ConfigurationError

SAMPLES, SIDE = 10, 8
NEEDED = SAMPLES * SIDE * SIDE * 3


@pytest.fixture
def file(tmp_path):
    pictures = [(torch.full((3, SIDE, SIDE), i, dtype=torch.uint8), i % 2) for i in range(SAMPLES)]
    return pack(pictures, tmp_path / "x.pack", size=None, progress=False, workers=0).paths[0]


def module(**files):
    return PackedDataModule(**files, cache="device", batch_size=4, seed=1)


@pytest.fixture
def no_allocation(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))


def test_too_much_is_refused_at_setup_with_both_numbers(file, monkeypatch, no_allocation):
    monkeypatch.setattr(_resident, "available_ram", lambda: NEEDED - 1)
    with pytest.raises(ConfigurationError, match=r"cache='device' needs 1,920 bytes on cpu and 1,919 are free. Leave cache out"):
        module(train=file).setup("fit")
    with pytest.raises(ConfigurationError, match="needs 1,920 bytes"):
        next(iter(module(train=file).loader("train")))


def test_splits_add_up_unless_they_are_one_file(file, tmp_path, monkeypatch):
    monkeypatch.setattr(_resident, "available_ram", lambda: NEEDED)
    module(train=file, val=file).setup("fit")
    other = file.rename(tmp_path / "y.pack")
    file.write_bytes(other.read_bytes())
    with pytest.raises(ConfigurationError, match="needs 3,840 bytes"):
        module(train=file, val=other).setup("fit")
    module(train=file, val=other).setup("validate")


def test_processes_of_one_machine_share_its_ram(file, monkeypatch):
    monkeypatch.setattr(_resident, "available_ram", lambda: 2 * NEEDED - 1)
    data = module(train=file)
    data.trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigurationError, match="needs 3,840 bytes"):
        data.setup("fit")


def test_an_accelerator_is_asked_itself(file, monkeypatch):
    numbers = {"mem_get_info": (1000, 9000), "memory_reserved": 500, "memory_allocated": 200}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    device = torch.device("cuda", 0)
    assert free_bytes(device) == 1300
    store = module(train=file)._store(module(train=file)._open("train"))
    with pytest.raises(ConfigurationError, match="needs 1,920 bytes on cuda:0 and 1,300 are free"):
        require_room([store], device, processes=8)


def test_the_loaders_of_a_file_have_one_store_and_every_epoch_reads_it(file, monkeypatch):
    data = module(train=file, val=file)
    data.setup("fit")
    (first, *_), (second, *_) = data.loader("train"), data.loader("val")
    assert torch.equal(first.image, second.image)
    monkeypatch.setattr(_resident, "available_ram", lambda: 0)
    data.setup("test")
    assert [int(image[0, 0, 0]) for batch in data.loader("test") for image in batch.image] == list(range(SAMPLES))


@pytest.mark.parametrize("names", [("memory.max", "memory.current", "."), ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory")])
def test_a_container_has_less_ram_than_its_machine(tmp_path, names):
    limit, used, place = names
    meminfo, folder = tmp_path / "meminfo", tmp_path / "groups" / place
    assert available_ram(meminfo, tmp_path / "groups") is None
    meminfo.write_text("MemTotal: 16 kB\nMemAvailable:       8 kB\n")
    assert available_ram(meminfo, tmp_path / "groups") == 8192
    folder.mkdir(parents=True)
    (folder / limit).write_text("max\n")
    (folder / used).write_text("5000\n")
    assert available_ram(meminfo, tmp_path / "groups") == 8192
    (folder / limit).write_text("6000\n")
    (folder / "memory.stat").write_text("anon 4000\nactive_file 700\ninactive_file 200\n")
    assert available_ram(meminfo, tmp_path / "groups") == 1900
