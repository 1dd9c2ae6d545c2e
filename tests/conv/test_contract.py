"""The contract of every way to compute a convolution, over the whole argument space of `nn.Conv2d`."""

import copy
import io
import math
import subprocess
import sys
import textwrap
import unittest.mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import conv2d
from torch.nn.utils import prune

from lightning_cnn.conv import _operator, report, restore, swap
from lightning_cnn.conv._call import NAMES
from lightning_cnn.conv._operator import convolve
from lightning_cnn.errors import ConfigurationError, NoEffectWarning
from lightning_cnn.functional.conv import winograd

EPS = 2.0**-23
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def layers(draw, dtype=torch.float64):
    """A convolution of any kind and a picture that fits it; half of them of the kind that Winograd and the depthwise kernel take."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 9]))
    c, k = groups * draw(st.sampled_from([1, 1, 2])), groups * draw(st.sampled_from([1, 1, 3]))
    plain = draw(st.booleans())
    padding = draw(st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.just("valid"), st.just("same")))
    kernel = (3, 3) if plain else (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    stride = (1, 1) if plain or padding == "same" else (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    dilation = (1, 1) if plain else (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]))
    layer = nn.Conv2d(c, k, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode, dtype=dtype)
    x = torch.randn(draw(st.integers(0, 3)), c, draw(st.integers(13, 17)), draw(st.integers(13, 20)), dtype=dtype)
    # Torch 2.15 itself corrupts memory in float32 backward passes of this kind: glibc's MALLOC_CHECK_ aborts without us, too
    corrupts = groups == 1 and stride != (1, 1) and dilation != (1, 1)
    x = x.to(memory_format=torch.channels_last) if draw(st.booleans()) and not corrupts else x
    return layer, x


def gradients(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], noise)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(data=st.data())
@FEW
def test_a_swapped_layer_equals_the_layer_in_float64(name, dtype, data):
    """Every padding, stride, dilation, group count and layout; 1e-12 shows that the algebra is exact, 1e-4 that float32 behaves."""
    layer, x = data.draw(layers(), label="layer")
    expected = gradients(layer, x)
    swap(layer.to(dtype), name)
    found = [*gradients(layer, x.to(dtype)), *gradients(layer, x.to(dtype))]  # again, by the short way where there is one
    with torch.no_grad():
        found += [layer(x.to(dtype)), layer(x.to(dtype))]  # and with what is kept
    for a, b in zip(found, [*expected * 2, *expected[:1] * 2], strict=True):
        assert a.shape == b.shape
        scale = b.abs().max().item() if b.numel() else 0.0
        assert (a - b).abs().max().item() <= (1e-12 if dtype == torch.float64 else 1e-4) * max(scale, 1) if a.numel() else True


def direct_bound(x, w):
    return (w[0].numel() + 2) * EPS * conv2d(x.abs(), w.abs(), padding=1)


def fft_bound(x, w):
    size = (x.shape[2] + 2) * (x.shape[3] + 2)
    return 8 * EPS * math.log2(size) * x.flatten(1).norm(dim=1)[:, None, None, None] * w.flatten(1).norm(dim=1)[:, None, None]


def absolute_matrices(m):
    return [torch.tensor([[abs(float(v)) for v in row] for row in M], dtype=torch.float64) for M in winograd.cook_toom(m, 3)]


def winograd_bound(x, w, m):
    """The same algorithm on absolute values bounds every product and sum; their roundings are at most c + 2 (m + 2) + 12 deep."""

    A, G, B = absolute_matrices(m)
    tiles = nn.functional.pad(x.abs(), (1, 1 + m, 1, 1 + m)).unfold(2, m + 2, m).unfold(3, m + 2, m)
    products = torch.einsum("pi,bcuvij,qj,pr,kcrs,qs->bkuvpq", B, tiles, B, G, w.abs(), G)
    y = torch.einsum("ip,bkuvpq,jq->bkuivj", A, products, A).flatten(4, 5).flatten(2, 3)
    return (x.shape[1] + 2 * (m + 2) + 12) * EPS * y[:, :, : x.shape[2], : x.shape[3]]


BOUNDS = {
    **dict.fromkeys(("default", "im2col", "layout", "depthwise"), direct_bound),
    **dict.fromkeys(("fft", "fft_tiled"), fft_bound),
    "winograd2": lambda x, w: winograd_bound(x, w, 2),
    "winograd4": lambda x, w: winograd_bound(x, w, 4),
}


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_float32_stays_within_the_bound_that_its_arithmetic_implies(name, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = 16 if name == "depthwise" else 1
    layer = nn.Conv2d(16, 16, 3, padding=1, bias=False, groups=groups)
    layer.weight.data.normal_(generator=generator)
    x = torch.randn(2, 16, 11, 13, generator=generator) * 10
    exact = conv2d(x.double(), layer.weight.double(), padding=1, groups=groups)
    swap(layer, name)
    with torch.no_grad():
        error = (layer(x) - exact).abs()
    w = layer.weight.detach().double()
    bound = BOUNDS[name](x.double(), w if groups == 1 else torch.diag_embed(w[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1))
    assert (error <= bound).all()
    assert report(layer).rows[0].algorithm == name


@pytest.mark.parametrize("m", [2, 4])
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_winograd_s_filter_gradient_stays_within_the_bound_that_its_arithmetic_implies(m, seed):
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(2, 16, 11, 13, generator=generator) * 10, torch.randn(2, 5, 11, 13, generator=generator)
    layer = swap(nn.Conv2d(16, 5, 3, padding=1, bias=False), f"winograd{m}")
    (found,) = torch.autograd.grad(layer(x), layer.weight, g)
    exact = torch.nn.grad.conv2d_weight(x.double(), layer.weight.shape, g.double(), padding=1)
    A, G, B = absolute_matrices(m)
    of_x = torch.nn.functional.pad(x.abs().double(), (1, 1 + m, 1, 1 + m)).unfold(2, m + 2, m).unfold(3, m + 2, m)
    of_g = torch.nn.functional.pad(g.abs().double(), (0, -13 % m, 0, -11 % m)).unfold(2, m, m).unfold(3, m, m)
    down, across = of_g.shape[2:4]
    of_x = torch.einsum("pi,bcuvij,qj->pqcbuv", B, of_x[:, :, :down, :across], B).flatten(3)
    of_g = torch.einsum("ip,bkuvij,jq->pqkbuv", A, of_g, A).flatten(3)
    bound = torch.einsum("pi,pqkt,pqct,qj->kcij", G, of_g, of_x, G)
    assert ((found - exact).abs() <= (of_x.shape[3] + 2 * (m + 2) + 12) * EPS * bound).all()


@pytest.mark.parametrize("name", NAMES)
def test_first_and_second_derivatives(name):
    groups = 2 if name == "depthwise" else 1
    layer = swap(nn.Conv2d(2, 2, 3, padding=(1, 0), groups=groups, dtype=torch.float64), name)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("role", ["forward", "input", "weight"])
@pytest.mark.parametrize("last", [False, True])
def test_the_operator_keeps_the_rules_of_torch(role, last):
    """Schema, fake tensors, autograd registration and compilation with dynamic shapes."""
    x, w = torch.randn(2, 4, 7, 6), torch.randn(6, 2, 3, 3)
    x = x.to(memory_format=torch.channels_last) if last else x
    g = conv2d(x, w, None, 2, 1, 1, 2).detach()
    a, b, size = {"forward": (x, w, []), "input": (g, w, [7, 6]), "weight": (x, g, [3, 3])}[role]
    bias = torch.randn(6, requires_grad=True) if role == "forward" else None
    arguments = (role, a.requires_grad_(), b.requires_grad_(), bias, size, [2, 2], [1, 1], [1, 1], 2, "fft", False)
    torch.library.opcheck(convolve, arguments)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 5, padding="same", padding_mode="reflect")
        self.wide = nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.block = nn.Sequential(
            nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 2, stride=2)
        )

    def forward(self, x):
        return self.block(self.wide(self.first(x)))


PLAN = {"first": "fft", "wide": "depthwise/layout/fft", "block.2": "winograd4", "block.*": "im2col"}


def close(a, b, tolerance=1e-4):
    return torch.allclose(a, b, atol=tolerance * b.abs().max().item(), rtol=0)


def test_names_identities_and_the_state_dict_do_not_change_and_restore_leaves_nothing():
    model = Net()
    before = {name: (layer.__class__, set(layer.__dict__)) for name, layer in model.named_modules()}
    objects = [id(value) for value in [*model.modules(), *model.parameters(), *model.buffers()]]
    keys, optimizer = list(model.state_dict()), torch.optim.SGD(model.parameters(), 0.1)
    assert swap(model, PLAN) is model
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert list(model.state_dict()) == keys
    assert isinstance(model.first, nn.Conv2d)
    assert restore(model) is model
    assert before == {name: (layer.__class__, set(layer.__dict__)) for name, layer in model.named_modules()}
    assert objects == [id(value) for value in [*model.modules(), *model.parameters(), *model.buffers()]]


def test_copies_and_pickles_compute_the_same():
    model, x = swap(Net().eval(), PLAN), torch.randn(2, 3, 16, 16)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), model(x))
        other.first.weight.data.zero_()  # and a copy is a copy
        assert not torch.equal(other(x), model(x))


def test_unbatched_pictures_vmap_and_export_work():
    """What the operator does not take goes the layer's original way."""
    model, x = Net().eval(), torch.randn(2, 3, 16, 16)
    expected = model(x)
    swap(model, PLAN)
    single = swap(nn.Conv2d(3, 4, 3), "fft")
    assert torch.equal(single(x[0]), single(x[:1])[0])
    assert close(torch.func.vmap(lambda picture: model(picture[None])[0])(x), expected)
    exported = torch.export.export(restore(model), (x,))
    assert close(exported.module()(x), expected)


@pytest.mark.parametrize("name", ["default", "fft"])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_parameter_that_a_hook_computes_is_the_one_that_is_used(name, parameter):
    """Pruning leaves a mask and an original where the parameter was; the second call takes the short way where there is one."""
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    prune.random_unstructured(layer, parameter, amount=0.5)
    expected = layer(x)
    swap(layer, name)
    assert close(layer(x), expected)
    assert close(layer(x), expected)


@pytest.mark.parametrize("last", [False, True])
def test_the_memory_format_is_that_of_the_stock_layer(last):
    x = torch.randn(2, 3, 16, 16)
    model = Net()
    model, x = (value.to(memory_format=torch.channels_last) if last else value for value in (model, x))
    expected = model(x)
    found = swap(model, PLAN)(x)
    assert found.stride() == expected.stride()
    assert close(found, expected)


def test_autocast_gives_the_type_and_the_values_of_the_stock_layer():
    model, x = Net().eval(), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        found = swap(model, PLAN)(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert close(found.float(), expected.float(), 0.05)


def test_compiled_in_one_graph_forward_and_backward():
    model, x = swap(Net(), PLAN), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = gradients(model, x), gradients(compiled, x)
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


def test_a_flop_counter_still_sees_the_convolutions():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 16, 16)).sum().backward()
        return counter.get_total_flops()

    model = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.Conv2d(8, 4, 3, padding=1))  # Torch miscounts groups in the backward pass
    assert flops(model) == flops(swap(model, "fft"))


def test_a_way_is_called_directly_unless_somebody_watches():
    """The dispatcher costs a small layer more than its arithmetic, and only counters and profilers look at what goes through it."""
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = swap(nn.Conv2d(3, 8, 5), "fft"), torch.randn(2, 3, 16, 16)
    with torch.profiler.profile():
        layer(x).sum().backward()
    expected, gradient, layer.weight.grad = layer(x).detach(), layer.weight.grad, None
    with unittest.mock.patch.object(_operator, "convolve", side_effect=AssertionError("through the dispatcher")):
        layer(x).sum().backward()
        with torch.no_grad():
            assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight.grad, gradient)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * expected.numel() * 3 * 5 * 5
    with torch.no_grad(), torch.profiler.profile() as profiler:
        layer(x)
    assert "lightning_cnn::convolve" in {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("name", ["default", "winograd4", "fft"])
def test_a_bias_is_trained_alone(name):
    layer, x = swap(nn.Conv2d(8, 8, 3, padding=1), name), torch.randn(2, 8, 9, 9)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 2 * 9 * 9.0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_the_next_layer_may_work_in_place(name, recorded, last):
    groups = 8 if name == "depthwise" else 1
    stock, x = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False), torch.randn(2, 8, 9, 9)
    stock, x = (of.to(memory_format=torch.channels_last) if last else of for of in (stock, x))
    swapped, outputs = swap(copy.deepcopy(stock), name), []
    for layer in (stock, swapped):
        with torch.set_grad_enabled(recorded):
            y = layer(x)
        outputs.append(y.mul_(torch.ones(1, requires_grad=True)).relu_())
        outputs[-1].sum().backward()
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=0)
    if recorded:
        torch.testing.assert_close(swapped.weight.grad, stock.weight.grad, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["im2col", "layout", "winograd4"])
@pytest.mark.parametrize("last", [False, True])
def test_gradients_have_the_memory_layout_that_torch_gives_them(name, last):
    """A gradient in the other layout is copied once more for each step, which costs more than any algorithm saves."""
    layout = torch.channels_last if last else torch.contiguous_format
    stock, x = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=layout), torch.randn(2, 8, 9, 9).to(memory_format=layout)
    x.requires_grad_()
    strides = [
        [gradient.stride() for gradient in torch.autograd.grad(layer(x).sum(), (x, layer.weight))]
        for layer in (stock, swap(copy.deepcopy(stock), name))
    ]
    assert strides[0] == strides[1]


@pytest.mark.parametrize("name", ["winograd4", "winograd2", "fft", "fft_tiled"])
@pytest.mark.parametrize("change", ["step", "data", "load", "assign", "inference"])
def test_kept_transforms_follow_every_update(name, change):
    layer, x = swap(nn.Conv2d(8, 8, 3, padding=1), name), torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        layer(x)  # the transform is kept
    if change == "step":
        optimizer = torch.optim.SGD(layer.parameters(), 1.0)
        layer(x).square().sum().backward()
        optimizer.step()
    elif change == "data":
        layer.weight.data.mul_(2)
    elif change == "load":
        layer.load_state_dict({key: torch.randn_like(value) for key, value in layer.state_dict().items()})
    elif change == "assign":
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    else:
        with torch.inference_mode():
            layer.weight.mul_(2)
    with torch.no_grad():
        found = layer(x)
    assert close(found, restore(layer)(x))
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_what_an_algorithm_cannot_do_falls_back_and_is_listed():
    model = swap(nn.Sequential(nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 3)), "winograd4")
    with torch.no_grad():
        model(torch.randn(1, 3, 12, 12))
    first, second = report(model).rows
    assert (first.algorithm, second.algorithm) == ("default", "winograd4")
    assert "needs 3x3 kernels, this one is 5x5" in first.reason


def test_every_mistake_is_named_at_once():
    with pytest.raises(ConfigurationError, match=r"(?s)2 problems.*no algorithm 'winograd9'.*max_error is a relative error"):
        swap(Net(), "winograd9", max_error=0)
    with pytest.raises(ConfigurationError, match=r"No convolution is called 'layer9\*'; there are: first, wide"):
        swap(Net(), {"layer9*": "fft"})
    with pytest.warns(NoEffectWarning, match="no plain nn.Conv2d"):
        swap(nn.Linear(2, 2), "fft")


def test_two_processes_agree_on_gradients_and_on_what_was_measured():
    script = """
        import os, sys, torch, torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel as DDP
        from lightning_cnn.conv import swap
        from lightning_cnn.conv._swap import tuners
        torch.set_num_threads(1)

        def work(rank):
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
            dist.init_process_group("gloo", rank=rank, world_size=2)
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 7, padding=3, groups=8), torch.nn.Conv2d(8, 8, 3, padding=1))
            x = torch.randn(4, 8, 16, 16)
            model(x).square().sum().div(2).backward()
            expected = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            swap(model, "auto", cache=None)
            ddp = DDP(model)
            ddp(x[2 * rank : 2 * rank + 2]).square().sum().backward()
            (tuner,) = tuners(model)
            assert not tuner.decisions
            if rank == 1:
                with torch.no_grad():
                    model(x[:1])  # what one alone has met is measured for all
            measured = tuner.tune_pending()
            model.zero_grad()
            ddp(x[2 * rank : 2 * rank + 2]).square().sum().backward()
            for p, e in zip(model.parameters(), expected):
                assert torch.allclose(p.grad, e, atol=1e-3 * e.abs().max().item()), (p.grad - e).abs().max()
            names = [None, None]
            dist.all_gather_object(names, sorted((str(c), d.algorithm, d.seconds) for c, d in tuner.decisions.items()))
            assert names[0] == names[1] and measured == 7, (measured, names)
            dist.barrier()
            os._exit(0)  # gloo's threads may abort while the interpreter is torn down; all that was to be seen is seen

        if __name__ == "__main__":
            torch.multiprocessing.spawn(work, nprocs=2)
            print("agreed")
    """
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "two_processes.py")
        path.write_text(textwrap.dedent(script))
        done = subprocess.run([sys.executable, path, port], capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.endswith("agreed\n"), done.stderr[-3000:]
