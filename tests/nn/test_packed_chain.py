"""A module of packed layers and additions runs in one go and stays equal, bit for bit."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.nn import pack
from lightning_cnn.nn.low_bit import BitWidths, lower
from lightning_cnn.nn.packed_chain import PackedChain, _places


class Block(nn.Module):
    """torchvision's basic block, its ReLUs dropped."""

    def __init__(self, channels, filters, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False), nn.BatchNorm2d(filters)
        self.conv2, self.bn2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters)
        self.relu = nn.Identity()
        beside = nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
        self.downsample = nn.Sequential(*beside) if stride > 1 else None

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Two(nn.Module):
    """Two convolutions and what `rule` makes of them."""

    def __init__(self, rule, stride=1):
        super().__init__()
        self.a, self.b = nn.Conv2d(20, 20, 3, padding=1), nn.Conv2d(20, 20, 3, stride, padding=1)
        self.rule = rule

    def forward(self, x):
        return self.rule(self, x)


def added_to_the_input(self, x):
    x += self.b(self.a(x))
    return x


def read_before_and_after(self, x):
    y = self.a(x)
    z = self.b(y)
    z += y
    return self.a(z + y)


def changed_after_a_second_reader(self, x):
    y = self.a(x)
    z = self.b(x)
    kept = y
    y += z
    return kept + self.a(y)


def words_of(model):
    """`model` with 1-bit layers and norms worth folding, in a network whose root is not the chain itself."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            lower(module, BitWidths())
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 3)
            module.weight.data.normal_()
            module.bias.data.normal_()
    return nn.Sequential(model).eval()


def chains(model):
    return [module for module in model.modules() if isinstance(module, PackedChain)]


def before_and_after(model, size=(2, 70, 7, 6)):
    """The packed model, its output and that of the float one, on inputs with both zeros."""
    packed, x = pack(model), torch.randn(size)
    x[:, :2] = torch.tensor([0.0, -0.0])[:, None, None]
    with torch.inference_mode():
        return packed, packed(x.clone()), model(x.clone())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_residual_blocks_are_one_chain_that_equals_them(memory_format, threads):
    model = words_of(nn.Sequential(Block(70, 70), Block(70, 33, 2), Block(33, 33), Block(33, 130, 2), Block(130, 130)))
    packed, x = pack(model), torch.randn(2, 70, 13, 14).contiguous(memory_format=memory_format)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.inference_mode():
        for y in (x, x[:1, :, :9]):
            assert torch.equal(packed(y), model(y))
    torch.set_num_threads(before)
    (chain,) = chains(packed)
    assert [step.plus for step in chain._chain[0] if step.plus is not None] == [0, 4, 5, 9, 10]


def test_keys_stay_and_a_copy_loads_them():
    model = words_of(nn.Sequential(Block(16, 16), Block(16, 16)))
    packed, other = pack(model), pack(words_of(nn.Sequential(Block(16, 16), Block(16, 16))))
    assert all(key.startswith(("0.0.conv", "0.1.conv")) for key in packed.state_dict())
    x = torch.randn(1, 16, 5, 5)
    fresh = copy.deepcopy(other)
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(x), model(x)) and not torch.equal(other(x), model(x))


@pytest.mark.parametrize("rule", [added_to_the_input, read_before_and_after, changed_after_a_second_reader])
def test_what_changes_a_value_that_others_read_is_no_chain(rule):
    packed, got, want = before_and_after(words_of(Two(rule)), (1, 20, 6, 6))
    assert torch.equal(got, want) and not chains(packed)


@pytest.mark.parametrize("rule", [lambda self, x: self.a(x) * self.b(x), lambda self, x: self.a(x) + 1, lambda self, x: self.a(x) + x])
def test_other_operations_and_single_layers_are_no_chain(rule):
    model = Two(rule)
    model.b = model.b if "b" in rule.__code__.co_names else None
    packed, got, want = before_and_after(words_of(model), (1, 20, 6, 6))
    assert torch.equal(got, want) and not chains(packed)


def test_a_sum_that_broadcasts_is_made_layer_by_layer():
    model = words_of(Two(lambda self, x: self.b(self.a(x)) + x, stride=6))
    packed, got, want = before_and_after(model, (1, 20, 6, 6))
    assert torch.equal(got, want) and len(chains(packed)) == 1


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_inputs_of_other_types_go_as_it_is_written(kind):
    packed = pack(words_of(nn.Sequential(Block(16, 16))))
    x = torch.randn(1, 16, 5, 5).to(kind)
    want = nn.Sequential.forward(packed[0], x)
    assert torch.equal(packed(x), want) and want.dtype == torch.float32


def test_hooks_of_inner_modules_are_called():
    packed, seen = pack(words_of(nn.Sequential(Block(16, 16)))), []
    x = torch.randn(1, 16, 5, 5)
    want = packed(x)
    handle = packed.get_submodule("0.0.conv2").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    assert torch.equal(packed(x), want) and seen == [torch.int64]
    handle.remove()
    handle = packed[0][0].register_forward_hook(lambda *_: seen.append("block"))
    assert torch.equal(packed(x), want) and seen == [torch.int64, "block"]
    handle.remove()
    assert torch.equal(packed(x), want) and len(seen) == 2
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    assert torch.equal(packed(x), want) and type(packed[0][0].conv1) in seen
    handle.remove()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_chain_keeps_its_class_and_is_copied_and_pickled_whole(again):
    packed, x = pack(words_of(nn.Sequential(Block(16, 16)))), torch.randn(1, 16, 5, 5)
    copied = again(packed)
    (chain,) = chains(copied)
    assert isinstance(chain, nn.Sequential) and isinstance(chain[0], Block) and type(chain) is type(packed[0])
    assert chain._chain[1][0] is chain[0].conv1 is not packed[0][0].conv1
    assert torch.equal(copied(x), packed(x))
    copied[0][0].conv1.finish.zero_()
    assert not torch.equal(copied(x), packed(x))


@pytest.mark.parametrize("form", ["jit.trace", "make_fx", "vmap", "one layer"])
def test_whoever_records_the_operators_sees_them(form):
    """A tracer that saw none would keep the result on its example as a constant."""
    model = words_of(nn.Sequential(Block(16, 16)) if form != "one layer" else nn.Conv2d(16, 16, 3))
    packed, x, example = pack(model), torch.randn(1, 16, 5, 5), torch.randn(1, 16, 5, 5)
    with torch.inference_mode(form == "vmap"):
        if form == "jit.trace":
            traced = torch.jit.trace(lambda x: packed(x), example, check_trace=False)
        else:
            traced = torch.vmap(packed) if form == "vmap" else make_fx(packed)(example)
        got = traced(x[None])[0] if form == "vmap" else traced(x)
    assert torch.equal(got, model(x))


@pytest.mark.parametrize("model", [nn.Sequential(Block(16, 16)), nn.Conv2d(16, 5, 3), nn.Linear(7, 5)], ids=["chain", "conv", "linear"])
def test_a_gradient_is_refused_and_not_lost(model):
    for module in model.modules() if not list(model.children()) else ():
        lower(module, BitWidths())
    packed = pack(words_of(model))
    x = torch.randn(2, 7) if isinstance(model, nn.Linear) else torch.randn(1, 16, 5, 5)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    with pytest.raises(UnsupportedLayerError, match="passes no gradient on"):
        packed(x.requires_grad_())
    with torch.no_grad():
        assert torch.equal(packed(x), packed(x.detach()))


def test_a_profiler_sees_the_layers_of_a_chain():
    packed, x = pack(words_of(nn.Sequential(Block(16, 16)))), torch.randn(1, 16, 5, 5)
    want = packed(x)
    with torch.profiler.profile() as profiler:
        assert torch.equal(packed(x), want)
    assert {event.key: event.count for event in profiler.key_averages()}["lightning_cnn::xnor_conv2d"] == 2


def test_memory_is_used_again():
    """A residual network of any depth needs two results of floats and one of words, and no two that live together overlap."""
    chain = chains(pack(words_of(nn.Sequential(*(Block(64, 64) for _ in range(6))))))[0]
    sizes, places, room = _places(chain._chain[0], (1, 8, 8))
    floats, words = 8 * 8 * 64 * 4, 8 * 8 * 8
    assert room <= 2 * floats + 2 * words
    assert len(sizes) == 13 and len(places) == 11


def test_coefficients_of_another_dtype_are_refused():
    model = pack(words_of(nn.Sequential(Block(16, 16)))).double()
    with pytest.raises(UnsupportedLayerError, match=r"coefficients in torch\.float64"):
        model(torch.randn(1, 16, 5, 5))
