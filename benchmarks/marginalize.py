"""What test-time marginalisation costs: late expansion against one pass, picture views against ttach.

    python benchmarks/marginalize.py [--quick] [--json FILE]

MC dropout with 10 members on torchvision networks at 224 px against one plain pass: FLOPs (counted, exact) and wall time; `theirs` is
1.06 or 1.3 passes, the price aimed at, so that a ratio above 1 means cheaper. ttach (0.0.3) merges the same views by its own wrapper.
"""

import argparse
from collections.abc import Callable

import _bench
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model

from lightning_cnn.callbacks import HorizontalFlip, MCDropout, TenCrop, marginalized

NETWORKS = ("vgg16", "efficientnet_b0", "mobilenet_v3_large")


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return get_model(name, num_classes=1000).eval()


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counted:
        call()
    return counted.get_total_flops()


def late_expansion(name: str, rounds: int, batch: int) -> list[_bench.Row]:
    """One network plain, with 10 members late, and with 10 members in a naive loop that draws the same masks."""
    plain, late, loop = network(name), network(name), network(name)
    image = torch.rand(batch, 3, 224, 224)
    few = image[:2]
    with marginalized(late, [MCDropout(10)]), marginalized(loop, [MCDropout(10)], expand="loop"):
        late(few)  # looks whether a skip spans the dropout, once
        gap = (late(few) - loop(few)).abs().max().item()
        passes = flops(lambda: late(few)) / flops(lambda: plain(few))
        calls = {"plain": lambda: _bench.seconds(lambda: plain(image)), "late": lambda: _bench.seconds(lambda: late(image))}
        _bench.interleave(calls, 1)
        wall = _bench.interleave(calls, rounds)
        naive = _bench.seconds(lambda: loop(few)) / len(few)
    ratio = _bench.medians({"": [b / a for a, b in zip(wall["plain"], wall["late"], strict=True)]})[""]
    ours = _bench.medians(wall)["late"] / batch
    lower = {"larger_is_better": False}
    return [
        _bench.compare(f"{name}: FLOPs, K=10", "1.06 passes", passes, 1.06, "passes", **lower, bar=1, n=1),
        _bench.compare(f"{name}: wall, K=10", "1.3 passes", ratio, 1.3, "passes", **lower, bar=1, n=rounds),
        _bench.compare(f"{name}: wall a picture, K=10", "naive loop, run once", ours, naive, "s", **lower, n=rounds),
        _bench.compare(f"{name}: largest difference to the loop", "1e-5", max(gap, 1e-12), 1e-5, "log p", **lower, bar=1, n=2),
    ]


def picture_views(rounds: int) -> list[_bench.Row]:
    """ttach wraps the module; both average probabilities of the same views of the same pictures."""
    try:
        import ttach
    except ImportError:
        return [_bench.missing("flip and five crops against a wrapper", "ttach", "pip install ttach")]
    rows = []
    for name, batch, size in (("mobilenet_v3_large", 8, 224), ("resnet18", 32, 64)):
        net, image = network(name), torch.rand(batch, 3, size, size)
        cut = size - size // 8
        cases = {
            "flip": ([HorizontalFlip()], [ttach.HorizontalFlip()]),
            "ten crops": ([TenCrop(cut)], [ttach.HorizontalFlip(), ttach.FiveCrops(cut, cut)]),
        }
        for case, (views, transforms) in cases.items():
            theirs = ttach.ClassificationTTAWrapper(nn.Sequential(net, nn.Softmax(-1)), ttach.Compose(transforms), merge_mode="mean")

            def ours(net: nn.Module = net, image: Tensor = image, views: list = views) -> Tensor:
                with marginalized(net, views):
                    return net(image)

            gap = (ours().exp() - theirs(image)).abs().max().item()
            if case == "flip":
                assert gap < 1e-5, gap  # ttach's centre crop is rounded the other way, so only flips are equal to the last pixel
            calls = {"ours": lambda f=ours: _bench.seconds(f), "theirs": lambda f=theirs, x=image: _bench.seconds(lambda: f(x))}
            middle = _bench.medians(_bench.interleave(calls, rounds))
            row = f"{name} {batch}x{size}px: {case}"
            rows.append(
                _bench.compare(row, "ttach 0.0.3", middle["ours"], middle["theirs"], "s", larger_is_better=False, bar=1, n=rounds)
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    with torch.inference_mode():
        rounds, batch = (3, 2) if options.quick else (7, 4)
        rows = [row for name in NETWORKS for row in late_expansion(name, rounds, batch)] + picture_views(rounds)
    _bench.report(rows, options.json)


if __name__ == "__main__":
    main()
