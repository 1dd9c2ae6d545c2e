"""From seconds a step to a verdict: what holds a training run back, what mending it could gain at most, and what to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_cnn.functional.step_probe import Reads

STAGES: tuple[str, ...] = ("data", "copy", "augment", "forward", "backward", "optimizer", "logging", "callbacks", "other")
CPU_BOUND = 0.5  # of the wait for data: above it the CPUs work, below it they wait too


@dataclass(frozen=True)
class Measurement:
    """What was seen of a run, a step on average. `stages` follow the GPU's time line where there is one, else the CPU's."""

    stages: Mapping[str, float]  # seconds
    images: float = 0.0
    cpu_share: float | None = None  # of the time spent waiting for data, in which this process or a loader's worker computed
    workers: int = 0
    pinned: bool | None = None  # None where nothing is copied or nobody knows
    reads: Mapping[str, Reads] = field(default_factory=dict)  # values read back from the device, by place in the code
    operations: int = 0  # of forward and backward
    operation_s: float = 0.0  # what starting one costs, however small it is
    slowest_callback: tuple[str, float] = ("", 0.0)
    flops: int = 0
    peak_flops_per_s: float = 0.0
    device: str = "cpu"

    @property
    def step_s(self) -> float:
        return sum(self.stages.values(), start=0.0)

    @property
    def images_per_s(self) -> float:
        return self.images / self.step_s if self.step_s else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: of what a large matrix product reaches here; None where the operations were not counted."""
        known = self.flops and self.peak_flops_per_s and self.step_s
        return self.flops / self.step_s / self.peak_flops_per_s if known else None

    @property
    def idle_s(self) -> float:
        """Of the device's time line: what the host alone was busy with."""
        return self["data"] + self["logging"] + self["callbacks"] + self["other"]

    def __getitem__(self, stage: str) -> float:
        return self.stages.get(stage, 0.0)


@dataclass(frozen=True)
class Finding:
    """`gain_s` is the most that a step can become shorter (or, for a small batch, what the same pictures could cost less)."""

    name: str
    gain_s: float
    what: str
    do: str


def diagnose(found: Measurement, *, worth: float = 0.05) -> list[Finding]:
    """Everything that costs at least the share `worth` of a step, dearest first.

    >>> slow = Measurement({"data": 0.08, "forward": 0.02}, cpu_share=0.02)
    >>> [finding.name for finding in diagnose(slow)]
    ['slow_disk']
    """
    rules = (_data, _copy, _augmentation, _reads, _batch, _logging, _callbacks)
    findings = [finding for rule in rules if (finding := rule(found)).gain_s >= worth * found.step_s > 0]
    return sorted(findings, key=lambda finding: -finding.gain_s)


def _data(m: Measurement) -> Finding:
    cost = f"{_ms(m['data'])} a step is spent waiting for data"
    if m.cpu_share is None:
        do = "Pack the pictures once (lightning-cnn pack), or give the loader more workers."
        return Finding("slow_data", m["data"], f"{cost}.", do)
    share = f"the CPUs compute during {min(m.cpu_share, 1):.0%} of that"
    if m.cpu_share < CPU_BOUND:
        do = (
            "Pack the pictures into one file (lightning-cnn pack), keep them on a local disk, "
            f"or overlap the waits (num_workers, now {m.workers})."
        )
        return Finding("slow_disk", m["data"], f"{cost}, and {share}: the disk or network is slow.", do)
    do = (
        f"Pack the pictures at the size you train on (lightning-cnn pack), move random transforms to the device (BatchAugmentation), "
        f"or use more workers (num_workers, now {m.workers})."
    )
    return Finding("slow_decode", m["data"], f"{cost}, and {share}: decoding and transforming are slow.", do)


def _copy(m: Measurement) -> Finding:
    cost = f"{_ms(m['copy'])} a step is spent copying to the device"
    if m.pinned is False:
        return Finding(
            "unpinned_copy", m["copy"], f"{cost}, from pageable memory.", "pin_memory=True in the loader, or DevicePrefetch()."
        )
    return Finding(
        "copy", m["copy"], f"{cost}.", "DevicePrefetch() copies the next batch meanwhile; uint8 pictures are a quarter of float32."
    )


def _augmentation(m: Measurement) -> Finding:
    what = f"{_ms(m['augment'])} a step is spent on augmentation."
    return Finding("augmentation", m["augment"], what, "augment=affine is one fused resampling; drop the operations that do not pay.")


def _reads(m: Measurement) -> Finding:
    costs = {place: reads.seconds + reads.operations * m.operation_s for place, reads in m.reads.items()}
    seconds = sum(costs.values(), start=0.0)
    if m.device != "cpu":  # the wait itself is work that has to be done; what is lost is what the device idles afterwards
        seconds = min(seconds, m.idle_s)
    place = max(costs, key=lambda name: costs[name], default="")
    many = m.reads[place].values if place else 0
    what = f"{place} reads {many} values a step back from the device (.item(), bool(), .cpu()), and waits for it each time."
    do = "Keep tensors: log them as they are, sum on the device, and read once an epoch."
    return Finding("synchronising_metric", seconds, what, do)


def _batch(m: Measurement) -> Finding:
    """Twice the pictures in a step halve, for each of them, what a step costs whatever it holds."""
    launches = min(m["forward"] + m["backward"], m.operations * m.operation_s)
    fixed = launches + m["optimizer"] + m["other"]
    why = f"starting {m.operations} operations, updating the weights"
    what = f"{_ms(fixed)} of a step of {m.images:.0f} pictures does not depend on how many they are ({why})."
    return Finding(
        "small_batch", fixed / 2, what, "A larger batch (with the learning rate scaled), torch.compile, or CUDA graphs: FastTraining()."
    )


def _logging(m: Measurement) -> Finding:
    what = f"{_ms(m['logging'])} a step is spent writing logs."
    return Finding("slow_logger", m["logging"], what, "Trainer(log_every_n_steps=...) larger, a faster logger, or LeanLogging().")


def _callbacks(m: Measurement) -> Finding:
    name, seconds = m.slowest_callback
    what = f"{_ms(m['callbacks'])} a step is spent in callbacks and hooks, {_ms(seconds)} of it in {name or 'no single one'}."
    return Finding("slow_callback", m["callbacks"], what, f"Run {name or 'them'} less often, or make it cheaper.")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
