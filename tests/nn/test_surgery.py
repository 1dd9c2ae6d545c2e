"""A rewrite saves what the lecture says, is equal where its form allows, and leaves the rest of the model and optimizer alone."""

import pytest
import torch
import torch.nn.functional as F
from _transfer import run_two_processes
from torch import nn

from lightning_cnn.errors import UnsupportedLayerError
from lightning_cnn.nn import architecture
from lightning_cnn.nn.blocks import Bottleneck, FactorizedConv, SeparableConv, SmallFilterStack
from lightning_cnn.nn.surgery import bottleneck, depthwise_separable, factorize, stack_small_filters

C = 16
REWRITES = [stack_small_filters, bottleneck, factorize, depthwise_separable]


def weights(module):
    return sum(p.numel() for p in module.parameters())


def network(kernel=7, stride=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, C, 1), nn.ReLU(), nn.Conv2d(C, C, kernel, stride, kernel // 2), nn.BatchNorm2d(C), nn.ReLU())


def test_blocks_have_the_lecture_s_weights():
    assert weights(SmallFilterStack(C, C, 7, bias=False)) == 27 * C**2
    assert weights(Bottleneck(C, C, bias=False)) == 3.25 * C**2
    assert weights(FactorizedConv(C, C, 3, bias=False)) == 6 * C**2
    assert weights(SeparableConv(C, C, 3, bias=False)) == C**2 + 9 * C


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("rewrite", REWRITES)
def test_output_size_and_receptive_field_stay(rewrite, stride):
    model, image = network(stride=stride), torch.rand(2, 3, 20, 23)
    before = architecture(model, image)["4"]
    rewrite(model, layers="2")
    after = architecture(model, image)["4"]
    assert (after.output, after.seen) == (before.output, before.seen)


@pytest.mark.parametrize(("stride", "padding", "dilation", "kernel"), [(1, 1, 1, 3), (2, 0, 1, 5), ((1, 2), (2, 1), 2, (3, 4))])
def test_at_full_rank_the_factorised_convolution_is_equal(stride, padding, dilation, kernel):
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation).double()
    image = torch.rand(2, 3, 17, 19, dtype=torch.float64)
    assert torch.allclose(FactorizedConv.of(conv, rank=999)(image), conv(image), rtol=0, atol=1e-13)


def test_a_separable_filter_is_found_again():
    conv = nn.Conv2d(3, 5, 3, 2, 1).double()
    form = SeparableConv(3, 5, 3, stride=2).double()
    conv.weight.data = (form[1].weight * form[0].weight.transpose(0, 1)).detach()
    image = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    assert torch.allclose(SeparableConv.of(conv)(image), conv(image), rtol=0, atol=1e-13)


def test_the_svd_is_the_best_of_its_rank():
    """The squared error is the sum of the squared singular values left out (Eckart and Young)."""
    conv = nn.Conv2d(4, 6, 3, bias=False).double()
    form = FactorizedConv.of(conv, rank=5)
    rebuilt = torch.einsum("krp,rcq->kcpq", form[1].weight[..., 0], form[0].weight[:, :, 0])
    left_out = torch.linalg.svdvals(conv.weight.permute(0, 2, 1, 3).reshape(18, 12))[5:]
    assert (rebuilt - conv.weight).square().sum().item() == pytest.approx(left_out.square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("rewrite", REWRITES)
def test_the_rest_of_the_model_and_its_optimizer_state_are_kept(rewrite):
    model = network()
    optimizer = torch.optim.Adam([{"params": model[:2].parameters(), "lr": 0.1}, {"params": model[2:].parameters(), "lr": 0.01}])

    def step():
        optimizer.zero_grad()
        F.mse_loss(model(torch.rand(2, 3, 9, 9)), torch.rand(2, C, 9, 9)).backward()
        optimizer.step()

    step()
    kept = [p for place in (0, 3) for p in model[place].parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in kept]
    old = list(model[2].parameters())
    rewrite(model, layers="2", optimizer=optimizer)
    assert [id(p) for place in (0, 3) for p in model[place].parameters()] == [id(p) for p in kept]
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moment) for p, moment in zip(kept, moments, strict=True))
    assert not any(p in optimizer.state for p in old)
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in model[2:].parameters()}
    before = [p.detach().clone() for p in model[2].parameters()]
    step()
    assert all(not torch.equal(p, b) for p, b in zip(model[2].parameters(), before, strict=True))


def test_a_shared_frozen_convolution_is_replaced_wherever_it_stands():
    conv = nn.Conv2d(C, C, 5, padding=2).requires_grad_(False)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    assert len(stack_small_filters(model).savings) == 1
    assert model[0] is model[2]
    assert not any(p.requires_grad for p in model.parameters())


def test_the_report_names_savings_and_what_was_left_alone():
    text = str(stack_small_filters(network()))
    assert "2: 12,560 -> 6,960 weights (1.80x fewer)" in text
    assert "0: left alone, it is 1x1" in text


def test_what_cannot_be_rewritten_is_refused_with_every_reason():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 64, 7, padding=3), nn.Conv2d(4, 4, 5))
    with pytest.raises(UnsupportedLayerError) as caught:
        stack_small_filters(model)
    for words in ("'0': it has 2 groups", "'1': it would have", "'2': it is 5x5 with padding (0, 0)"):
        assert words in str(caught.value)
    with pytest.raises(UnsupportedLayerError, match="no Conv2d has such a name"):
        factorize(model, layers="body.*")


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (nn.Conv2d(8, 8, 6, padding=3), "not odd, square and centred"),
        (nn.Conv2d(8, 8, 5, padding=2, dilation=2), "not odd, square and centred"),
        (nn.Conv2d(8, 8, 5, padding=2, padding_mode="reflect"), "with reflect"),
        (nn.Conv2d(8, 8, 5, padding="same"), "its padding is 'same'"),
        (Own(8, 8, 5, padding=2), "it is a Own"),
    ],
)
def test_a_convolution_of_another_form_is_left_alone(conv, why):
    model = nn.Sequential(conv, nn.Conv2d(8, 8, 5, padding=2))
    assert why in stack_small_filters(model).skipped["0"]
    assert model[0] is conv


def test_a_convolution_that_is_the_model_cannot_be_replaced():
    with pytest.raises(UnsupportedLayerError, match="it is the model itself"):
        factorize(nn.Conv2d(8, 8, 5))


@pytest.mark.parametrize("rewrite", REWRITES)
def test_precision_and_mode_are_those_of_the_convolution(rewrite):
    model = network().double().eval()
    rewrite(model, layers="2")
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("rewrite", REWRITES)
def test_a_rewritten_network_compiles_whole_and_its_gradients_are_those_of_eager(rewrite):
    model, image = network(), torch.rand(2, 3, 12, 12)
    rewrite(model, layers="2")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(compiled(image).square().sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


TWO_PROCESSES = """
import sys
import lightning as L, torch
from torch import nn
sys.path.insert(0, {tests!r})
from _transfer import QUIET
from lightning_cnn.nn.reparameterize import reparameterize
from lightning_cnn.nn.surgery import bottleneck, depthwise_separable, factorize, stack_small_filters

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Conv2d(8, 8, 5, padding=2) for _ in range(4)))
        for place, rewrite in enumerate((stack_small_filters, bottleneck, factorize, depthwise_separable)):
            rewrite(self.net, layers=str(place))
        self.net.append(nn.BatchNorm2d(8).eval())
    def on_train_start(self):
        self.net[-1].eval()
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

def trained(**options):
    data = torch.randn(16, 8, 9, 9, generator=torch.Generator().manual_seed(1))
    batch = 8 // options["devices"]
    model = Model()
    L.Trainer(max_epochs=2, use_distributed_sampler=True, **QUIET, **options).fit(model, torch.utils.data.DataLoader(data, batch))
    return model.eval()

two = trained(devices=2, strategy="ddp")
import torch.distributed as dist
merged, x = reparameterize(two.net), torch.ones(1, 8, 9, 9)
mine = [p.detach() for p in two.parameters()] + [merged(x).detach()]
theirs = [None, None]
dist.all_gather_object(theirs, mine)
assert all(torch.equal(a, b) for a, b in zip(*theirs, strict=True))
assert torch.allclose(merged(x), two.net(x), atol=1e-5)
rank = dist.get_rank()
dist.destroy_process_group()
if rank == 0:
    one = trained(devices=1)
    for a, b in zip(two.parameters(), one.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(two.parameters(), Model().parameters(), strict=True))
"""


def test_rewritten_and_merged_networks_in_two_processes_are_those_of_one(tmp_path):
    """Every rewrite in one network; the same global batches give the same weights."""
    run_two_processes(TWO_PROCESSES, tmp_path)
