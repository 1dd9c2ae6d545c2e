"""Every source of randomness at once, interrupted after each batch: the rest is the same to the last bit."""

import pytest
from reliability import _job as job

ALL = range(1, job.STEPS)
soak = pytest.mark.soak


@pytest.mark.parametrize(
    ("batches", "options"),
    [
        ([31], {}),
        pytest.param(ALL, {}, marks=soak, id="every step"),
        pytest.param(ALL, {"accumulate": 3}, marks=soak, id="every batch, 3 a step"),
        pytest.param(ALL, {"rounding": True}, marks=soak, id="every step, stochastic rounding"),
    ],
)
def test_resumed_after_a_batch(batches, options, tmp_path, figure):
    whole = job.train(job.SaveEveryBatch(tmp_path), **options)
    assert len(whole.losses) == job.STEPS
    for batch in batches:
        resumed = job.train(resume=tmp_path / f"{batch}.ckpt", **options)
        assert resumed.losses == whole.losses[batch:], batch
        assert job.same(whole, resumed), batch
    how = ", ".join(f"{name}={value}" for name, value in options.items()) or "each batch a step"
    figure(f"resumes of a 48-batch run ({how})", len(batches), "losses and weights equal to the bit")


@pytest.mark.forks
@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=soak)])
def test_memory_stays_flat(steps, tmp_path, figure):
    import resource

    class Watch(job.Callback):
        sizes = ()

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step % (steps // 10) == 0:
                with open("/proc/self/statm") as file:  # noqa: PTH123
                    self.sizes = (*self.sizes, int(file.read().split()[1]) * resource.getpagesize())

    watch = Watch()
    job.train(watch, max_epochs=-1, max_steps=steps, saver=job.last_saver(tmp_path, every=max(50, steps // 100)), limit_val_batches=0)
    growth = max(watch.sizes[3:]) / watch.sizes[2] - 1
    assert growth < (0.01 if steps >= 10_000 else 0.05)
    figure("growth of resident memory from 30 % to 100 % of a run, steps", steps, f"{100 * growth:.2f} %")
