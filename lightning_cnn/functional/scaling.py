"""How a learning rate follows the number of workers, and how a stale gradient is weighed."""


def lr_factor(workers: int, rule: str | None) -> float:
    """By how much to multiply a learning rate tuned for one worker when `workers` batches make one step.

    "linear" keeps the expected update per sample (Goyal et al. 2017, arXiv:1706.02677); "sqrt" keeps its variance (Krizhevsky 2014,
    arXiv:1404.5997) and suits adaptive optimizers.

    >>> lr_factor(4, "linear"), lr_factor(4, "sqrt"), lr_factor(4, None)
    (4.0, 2.0, 1.0)
    """
    return {"linear": float(workers), "sqrt": workers**0.5, None: 1.0}[rule]


def staleness_factor(staleness: int) -> float:
    """By how much to multiply the learning rate of a gradient computed `staleness` updates ago (Zhang et al. 2016, arXiv:1511.05950).

    >>> staleness_factor(0), staleness_factor(1), staleness_factor(4)
    (1.0, 1.0, 0.25)
    """
    return 1.0 / max(1, staleness)
