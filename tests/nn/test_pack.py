"""A packed model equals its float original, bit for bit, and is a thirty-second of it on disk."""

import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_cnn.errors import NoEffectWarning, UnsupportedLayerError
from lightning_cnn.nn import PackedConv2d, PackedLinear, pack
from lightning_cnn.nn.low_bit import BitWidths, lower
from lightning_cnn.nn.packed import NormMaxPool2d
from lightning_cnn.nn.packed_chain import PackedChain


def binary(model, scale=True, keep=()):
    """Lower every layer but those in `keep`, and give the norms statistics and signs worth folding."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name not in keep:
            lower(module, BitWidths(scale=scale))
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 3)
            module.running_var.uniform_(0.5, 20)
            module.weight.data.normal_()
            module.bias.data.normal_()
            module.weight.data[0] = 0
    return model.eval()


class Residual(nn.Module):
    def __init__(self, width=70):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act = nn.Identity()

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


def vgg():
    return nn.Sequential(
        *(nn.Conv2d(5, 70, 3, padding=1), nn.BatchNorm2d(70), nn.Hardtanh()),
        *(nn.Conv2d(70, 33, 3, stride=2, padding=1), nn.BatchNorm2d(33), nn.Dropout()),
        *(nn.Conv2d(33, 130, 2, dilation=2), nn.MaxPool2d(2), nn.BatchNorm2d(130)),
        *(nn.Flatten(), nn.Linear(520, 40), nn.BatchNorm1d(40), nn.Identity(), nn.Linear(40, 7)),
    )


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_packed_network_equals_the_float_one(scale, memory_format):
    model, x = binary(vgg(), scale), torch.randn(3, 5, 12, 11).contiguous(memory_format=memory_format)
    x[0, 0, 0] = -0.0
    packed = pack(model)
    with torch.inference_mode():
        assert torch.equal(packed(x), model(x))
    assert [m.to_words for m in packed.modules() if isinstance(m, PackedConv2d)] == [True, True, False]
    assert [m.to_words for m in packed.modules() if isinstance(m, PackedLinear)] == [True, False]


def test_a_residual_block_folds_norms_and_hands_on_words_inside():
    model, x = binary(nn.Sequential(Residual(), Residual())), torch.randn(2, 70, 6, 6)
    packed = pack(model)
    assert torch.equal(packed(x), model(x))
    assert [(m.to_words, m.folded) for m in packed.modules() if isinstance(m, PackedConv2d)] == [(True, True), (False, True)] * 2
    assert type(packed) is nn.Sequential
    assert all(isinstance(block, PackedChain) and isinstance(block, Residual) for block in packed)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "pool"), [(64, nn.MaxPool2d(3, 2, 1)), (45, nn.MaxPool2d((2, 3), (1, 2), (1, 0)))])
def test_a_norm_before_a_max_pool_goes_into_it(channels, pool, memory_format, threads):
    """With gains below zero and of zero, NaN, both infinities and both zeros."""
    ends = nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.Identity(), pool
    model = binary(nn.Sequential(*ends, nn.Conv2d(channels, 5, 1)), keep=("0",))
    packed, x = pack(model), torch.randn(2, 3, 13, 12).contiguous(memory_format=memory_format)
    x[0, 0, :4, 0] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.inference_mode():
        want, got = model[:4](x), packed[:4](x)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(packed(x), model(x))
    torch.set_num_threads(before)
    assert type(packed[3]) is NormMaxPool2d and type(packed[1]) is nn.Identity


def test_a_norm_in_a_pool_is_saved_and_loaded(tmp_path):
    def make():
        layers = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.MaxPool2d(2), nn.Conv2d(16, 5, 1)
        return binary(nn.Sequential(*layers), keep=("0",))

    model, x = make(), torch.randn(2, 3, 9, 9)
    save_file(pack(model).state_dict(), tmp_path / "packed.safetensors")
    state, fresh = load_file(tmp_path / "packed.safetensors"), pack(make())
    assert state["2.affine"].shape == (2, 16) and not any(key.startswith("1.") for key in state)
    assert not torch.equal(fresh(x), model(x))
    fresh.load_state_dict(state)
    assert type(fresh[2]) is NormMaxPool2d and torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2), nn.AvgPool2d(2)])
def test_other_pools_stay_as_they_are(pool):
    model = binary(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), pool, nn.Conv2d(8, 5, 1)), keep=("0",))
    packed, x = pack(model), torch.randn(1, 3, 9, 9)
    assert type(packed[2]) is type(pool) and torch.equal(packed(x), model(x))


def test_thresholds_hold_on_every_sum_the_layer_can_have():
    """Norms of either slope, of slope zero, and with statistics far away: all dots of a 3-channel layer, by all 8 inputs."""
    model = binary(nn.Sequential(nn.Linear(3, 64), nn.BatchNorm1d(64), nn.Linear(64, 5)))
    model[1].running_mean[:4] = torch.tensor([1e9, -1e9, 1.0, -1.0])
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    assert torch.equal(pack(model)(x), model(x))


def test_what_cannot_be_traced_is_packed_layer_by_layer():
    class Branching(Residual):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    model, x = binary(Branching()), torch.randn(1, 70, 5, 5)
    packed = pack(model)
    assert torch.equal(packed(x), model(x))
    assert not any(m.to_words or m.folded for m in packed.modules() if isinstance(m, PackedConv2d))


def test_a_module_called_twice_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn(self.conv(self.bn(self.conv(x))))

    model, x = binary(Shared()), torch.randn(1, 8, 5, 5)
    assert torch.equal(pack(model)(x), model(x))


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding_mode": "circular", "padding": 1}, {"padding": "same", "dilation": 1}])
def test_other_layers_stay_as_they_are(options):
    kernel = 4 if options.get("padding") == "same" else 3
    model = binary(nn.Sequential(nn.Conv2d(8, 8, kernel, **options), nn.Conv2d(8, 8, 1)))
    packed, x = pack(model), torch.randn(1, 8, 6, 6)
    assert type(packed[0]) is type(model[0]) and type(packed[1]) is PackedConv2d
    assert torch.equal(packed(x), model(x))


def test_the_file_is_a_thirty_second_and_loads(tmp_path):
    def make():
        return binary(nn.Sequential(nn.Conv2d(64, 256, 3), nn.BatchNorm2d(256), nn.Conv2d(256, 256, 3, bias=False)))

    model, x = make(), torch.randn(1, 64, 7, 7)
    save_file(pack(model).state_dict(), tmp_path / "packed.safetensors")
    state = load_file(tmp_path / "packed.safetensors")
    assert sum(v.nbytes for k, v in state.items() if "weight_bits" in k) * 32 == 4 * sum(model[i].weight.numel() for i in (0, 2))
    assert (tmp_path / "packed.safetensors").stat().st_size < 4 * sum(p.numel() for p in model.parameters()) / 25
    fresh = pack(make())
    assert not torch.equal(fresh(x), model(x))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), model(x))


def test_packed_layers_compile_and_pass_opcheck():
    """In a process of its own: dynamo cannot trace the shape checks that the tests add."""
    source = """
        import torch
        from torch import nn
        from lightning_cnn.nn import pack
        from lightning_cnn.nn.low_bit import BitWidths, lower
        from lightning_cnn.nn.packed import NormMaxPool2d, norm_pool2d, xnor_conv2d

        model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(72, 5))
        model.eval()
        for i in (0, 2, 4):
            lower(model[i], BitWidths())
        packed, x = pack(model), torch.randn(2, 8, 5, 5)
        with torch.inference_mode():
            assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), model(x))
        for layer, value in ((packed[0], x), (packed[2], packed[0](x))):
            constants = layer.panel, layer.finish, layer.filters, list(layer.geometry), layer.to_words
            torch.library.opcheck(xnor_conv2d, (value, *constants))
        pool = NormMaxPool2d(model[1], nn.MaxPool2d(3, 2, 1))
        torch.library.opcheck(norm_pool2d, (torch.randn(2, 8, 5, 6), pool.affine, pool.window))
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

            def forward(self, x):
                return self.b(self.a(x)) + x

        stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.MaxPool2d(2), Residual()).eval()
        for layer in (stem[3].a, stem[3].b):
            lower(layer, BitWidths())
        packed, images = pack(stem), torch.randn(2, 3, 11, 12)
        assert [type(module).__name__ for module in packed] == ["Conv2d", "Identity", "NormMaxPool2d", "PackedResidual"]
        with torch.inference_mode():
            assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(images), stem(images))
        trained = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(trained(x), model(x))
        trained(x).sum().backward()
        assert model[0].weight.grad is not None
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(source)], check=True, timeout=240)


def test_nothing_to_pack_is_reported():
    with pytest.warns(NoEffectWarning, match="no layer with 1-bit weights and 1-bit inputs"):
        pack(nn.Sequential(nn.Linear(2, 2)))


def test_a_folded_norm_refuses_inputs_it_was_not_folded_for():
    model = binary(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    with pytest.raises(UnsupportedLayerError, match=r"needs inputs of 2 axes, got \(2, 8, 8\)"):
        pack(model)(torch.randn(2, 8, 8))


def test_coefficients_of_another_dtype_are_refused():
    """They are read by address, so a cast would turn them into other numbers without a word."""
    model = pack(binary(nn.Sequential(nn.Conv2d(8, 8, 1)))).double()
    with pytest.raises(UnsupportedLayerError, match=r"coefficients in torch\.float64"):
        model(torch.randn(1, 8, 2, 2))
