"""Measure batch norm's statistics again, for weights that were averaged or changed without training."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cnn.nn.freezing import norm_layers


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any], mean_over_ranks: Callable[[Tensor], Tensor] = lambda t: t
) -> int:
    """Replace the running statistics by plain averages over `batches`; returns the number of layers.

    Only the norm layers are in training mode meanwhile: dropout stays off. The variance is that of all pixels together: the mean of
    the batch variances plus the variance of the batch means, also over the processes that `mean_over_ranks` averages.

    Source: Izmailov et al. 2018, arXiv:1803.05407, section 3.2.
    """
    layers = [layer for _, layer in norm_layers(model)]
    modes = {module: module.training for module in model.modules()}
    sums: dict[nn.Module, list[Tensor]] = {}
    handles = [layer.register_forward_pre_hook(lambda layer, inputs: _add(sums, layer, inputs[0])) for layer in layers]
    model.eval()
    for layer in layers:
        layer.training = True
    kept = {layer: {name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers}
    try:
        for batch in batches:
            forward(batch)
        measured = {layer: _statistics(*(mean_over_ranks(total) for total in sums[layer])) for layer in sums}
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
        for layer, buffers in kept.items():
            layer.load_state_dict({**layer.state_dict(), **buffers})
    for layer, (mean, variance) in measured.items():
        layer.get_buffer("running_mean").copy_(mean)
        layer.get_buffer("running_var").copy_(variance)
    return len(sums)


def _statistics(count: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    mean = total / count
    return mean, (squares / count - mean**2).clamp(min=0) * count / (count - 1).clamp(min=1)


def _add(sums: dict, layer: nn.Module, x: Tensor) -> None:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    wide = x.detach().to(torch.float64) if x.device.type != "mps" else x.detach().float()
    count = torch.tensor(float(x.numel() // x.shape[1]), dtype=wide.dtype, device=x.device)
    new = [count, wide.sum(axes), wide.square().sum(axes)]
    sums[layer] = [a + b for a, b in zip(sums[layer], new, strict=True)] if layer in sums else new
