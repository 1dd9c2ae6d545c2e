"""The peers of `loading.py`, each as a function that returns an endless stream of batch sizes for the same work.

Work: RandomResizedCrop 224 (antialiased, or as the peer does it), flip, normalise to float32; shuffled batches of 128 with labels, from
two workers.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

BATCH, SIZE, WORKERS = 128, 224, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INSTALL = {
    "ffcv": "apt install libopencv-dev libturbojpeg0-dev pkg-config; pip install ffcv",
    "nvidia.dali": "pip install nvidia-dali-cuda130",
    "spdl.io": "apt install libavdevice59 libavfilter8 (FFmpeg 5), pip install spdl",
    "grain": "pip install grain",
    "litdata": "pip install litdata", "webdataset": "pip install webdataset",
}  # fmt: skip


def endless(epoch: Callable[[], Iterator[int]]) -> Iterator[int]:
    while True:
        yield from epoch()


def ours(path: Path, lane: str = "fused", **options) -> Iterator[int]:
    from lightning_cnn.data import PackedDataModule

    options = {"size": SIZE, "mean": MEAN, "std": STD, "threads": WORKERS, "drop_last": True, "batch_size": BATCH, **options}
    loader = PackedDataModule(train=path, lane=lane, **options).loader("train", shuffle=True)
    return endless(lambda: (len(batch.label) for batch in loader))


def transform():
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def read(path: str) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(path, ImageReadMode.RGB)


def read_bytes(data: bytes) -> torch.Tensor:
    return read(torch.frombuffer(bytearray(data), dtype=torch.uint8))  # type: ignore[arg-type]


def torchvision_v2(folder: Path) -> Iterator[int]:
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(folder / "jpegs"), transform(), loader=read)
    loader = torch.utils.data.DataLoader(dataset, BATCH, True, num_workers=WORKERS, persistent_workers=True, drop_last=True)
    return endless(lambda: (len(label) for _, label in loader))


def image_folders(folder: Path) -> Iterator[int]:
    """Ours."""
    from lightning_cnn.data import ImageFolders

    data = ImageFolders(root=str(folder / "jpegs"), size_px=SIZE, batch_size=BATCH, num_workers=WORKERS)
    data.setup()
    loader = data.train_dataloader()
    return endless(lambda: (len(batch.label) for batch in loader))


def image_folder(folder: Path) -> Iterator[int]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    resize = v2.Compose([v2.Resize(SIZE, antialias=True), v2.CenterCrop(SIZE)])
    dataset = ImageFolder(str(folder / "jpegs"), resize, loader=read)
    loader = torch.utils.data.DataLoader(dataset, BATCH, True, num_workers=WORKERS, persistent_workers=True, drop_last=True)
    return endless(lambda: (len(label) for _, label in loader))


def ffcv(folder: Path, kind: str) -> Iterator[int]:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    scaled = NormalizeImage(np.array(MEAN) * 255, np.array(STD) * 255, np.float32)
    image = [
        RandomResizedCropRGBImageDecoder((SIZE, SIZE)),
        RandomHorizontalFlip(),
        scaled,
        ToTensor(),
        ToTorchImage(convert_back_int16=False),
    ]
    loader = Loader(
        str(folder / f"{kind}.beton"), batch_size=BATCH, num_workers=WORKERS, order=OrderOption.RANDOM, os_cache=True, drop_last=True,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )  # fmt: skip
    return endless(lambda: (len(label) for _, label in loader))


def dali(folder: Path) -> Iterator[int]:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    @pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=None, seed=1)
    def pipeline():
        data, label = fn.readers.file(file_root=str(folder / "jpegs"), random_shuffle=True, name="reader")
        image = fn.decoders.image_random_crop(data, output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[0.75, 4 / 3])
        image = fn.resize(image, size=[SIZE, SIZE])
        mean, std = [255 * value for value in MEAN], [255 * value for value in STD]
        flip = fn.random.coin_flip()
        return fn.crop_mirror_normalize(image, mirror=flip, mean=mean, std=std, dtype=types.FLOAT, output_layout="CHW"), label

    iterator = DALIGenericIterator(
        pipeline(), ["x", "y"], reader_name="reader", auto_reset=True, last_batch_policy=LastBatchPolicy.DROP
    )
    return endless(lambda: (len(data[0]["y"]) for data in iterator))


def dali_folder(folder: Path) -> Iterator[int]:
    """Ours."""
    from lightning_cnn.data import DALIFolder

    if not (folder / "split").exists():
        (folder / "split").mkdir()
        for name in ("train", "val"):
            (folder / "split" / name).symlink_to(folder / "jpegs")
    options = {"size_px": SIZE, "batch_size": BATCH, "mean": MEAN, "std": STD, "threads": WORKERS}
    loader = DALIFolder(root=str(folder / "split"), **options).train_dataloader()
    return endless(lambda: (len(batch.label) for batch in loader))


def spdl(folder: Path) -> Iterator[int]:
    """Decoding and resizing in SPDL's threads (its ffmpeg filters crop and scale), normalised as a batch."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder
    from torchvision.transforms import v2

    files = sorted((folder / "jpegs").rglob("*.jpg"))
    blank, chosen = torch.zeros(3, 350, 400), v2.RandomResizedCrop(SIZE)
    mean, std = torch.tensor(MEAN) * 255, torch.tensor(STD) * 255

    def load(k: int):
        box, flip = chosen.make_params([blank]), ",hflip" if torch.rand(()) < 0.5 else ""
        crop = f"crop={box['width']}:{box['height']}:{box['left']}:{box['top']}"
        steps = f"{crop},scale={SIZE}:{SIZE}:flags=bilinear{flip},format=pix_fmts=rgb24"
        return spdl.io.decode_packets(spdl.io.demux_image(str(files[k])), filter_desc=steps)

    def collate(frames):
        images = spdl.io.to_torch(spdl.io.convert_frames(frames))
        return ((images.float() - mean) / std).permute(0, 3, 1, 2)

    def epoch():
        order = torch.randperm(len(files))[: len(files) // BATCH * BATCH].tolist()
        builder = PipelineBuilder().add_source(order).pipe(load, concurrency=WORKERS).aggregate(BATCH).pipe(collate).add_sink(2)
        with (pipeline := builder.build(num_threads=WORKERS)).auto_stop():
            yield from (len(batch) for batch in pipeline)

    return endless(epoch)


def grain(folder: Path) -> Iterator[int]:
    import grain.python as g

    files, tv = [(str(f), int(f.parent.name[1:])) for f in sorted((folder / "jpegs").rglob("*.jpg"))], transform()

    class Augmented(g.MapTransform):
        def map(self, item):
            return tv(read(item[0])).numpy(), item[1]

    sampler = g.IndexSampler(len(files), shard_options=g.NoSharding(), shuffle=True, num_epochs=None, seed=1)
    operations = [Augmented(), g.Batch(BATCH, drop_remainder=True)]
    read_ahead = g.ReadOptions(prefetch_buffer_size=16)  # not its default of 500: what it has queued must not outlast a turn
    loader = g.DataLoader(data_source=files, sampler=sampler, operations=operations, worker_count=WORKERS, read_options=read_ahead)
    return (len(label) for _, label in loader)


def litdata(folder: Path) -> Iterator[int]:
    import litdata as lit

    tv = transform()

    class Augmented(lit.StreamingDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return tv(read_bytes(item["image"])), item["label"]

    dataset = Augmented(str(folder / "litdata"), shuffle=True, drop_last=True)
    loader = lit.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)
    return endless(lambda: (len(label) for _, label in loader))


def webdataset(folder: Path) -> Iterator[int]:
    import webdataset as wds

    tv = transform()
    shards = [str(path) for path in sorted((folder / "tars").glob("*.tar"))]
    data = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(500).to_tuple("jpg", "cls")
    batches = data.map_tuple(lambda b: tv(read_bytes(b)), int).batched(BATCH, partial=False)
    loader = wds.WebLoader(batches, batch_size=None, num_workers=WORKERS, persistent_workers=True)
    return endless(lambda: (len(label) for _, label in loader))


def small_pil(arrays: np.ndarray, labels: np.ndarray) -> Iterator[int]:
    from PIL import Image
    from torchvision import transforms as T

    steps = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(arrays)

        def __getitem__(self, index):
            return steps(Image.fromarray(arrays[index])), int(labels[index])

    loader = torch.utils.data.DataLoader(Pictures(), 512, True, num_workers=WORKERS, persistent_workers=True, drop_last=True)
    return endless(lambda: (len(label) for _, label in loader))


def take(stream: Iterator[int], batches: int) -> int:
    return sum(itertools.islice(stream, batches))
