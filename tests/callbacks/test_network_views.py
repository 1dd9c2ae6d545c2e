"""Noise kept in testing: one mask a sample, member and element, wherever the batch is repeated."""

import pytest
import torch
from torch import nn

from lightning_cnn.callbacks import HorizontalFlip, MCDropConnect, MCDropout, marginalized
from lightning_cnn.errors import ConfigurationError, UnsupportedLayerError
from lightning_cnn.nn import inject


class Skip(nn.Module):
    """A residual around the dropout."""

    def __init__(self, join):
        super().__init__()
        self.first, self.drop, self.head, self.join = nn.Linear(12, 8), nn.Dropout(0.5), nn.LazyLinear(3), join

    def forward(self, image):
        x = self.first(image.flatten(1))
        return self.head(self.join(x, self.drop(x)))


class FixedRows(nn.Module):
    """Reads the number of rows before the dropout and uses it behind."""

    def __init__(self):
        super().__init__()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(12, 3)

    def forward(self, image):
        b = image.shape[0]
        return self.head(self.drop(image).view(b, -1))


def straight(*drops):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *drops, nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, 3))


def network(kind):
    torch.manual_seed(0)
    made = {
        "straight": lambda: straight(),
        "two dropouts": lambda: straight(nn.Dropout2d(0.5)),
        "residual": lambda: Skip(torch.add),
        "in place": lambda: Skip(lambda x, y: x.mul_(1.0).add_(y)),
        "concatenation": lambda: Skip(lambda x, y: torch.cat([x, y], 1)),
        "fixed rows": FixedRows,
        "injected": lambda: straight(),
    }[kind]()
    made.eval()(torch.rand(2, 3, 2, 2))
    if kind == "injected":
        inject(made, dropout=0.2)
    return made


def outputs(net, image, expand, views=None, seed=0):
    with torch.no_grad(), marginalized(net, views or [MCDropout(6)], seed=seed, expand=expand) as members:
        return net(image), members


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", ["straight", "two dropouts", "residual", "in place", "concatenation", "fixed rows", "injected"])
def test_late_expansion_equals_the_naive_loop_with_the_same_masks(kind, rows):
    net, image = network(kind), torch.rand(rows, 3, 2, 2)
    loop, _ = outputs(net, image, "loop")
    late, members = outputs(net, image, "late")
    early, _ = outputs(net, image, "input")
    torch.testing.assert_close(late, loop, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(early, loop, rtol=1e-5, atol=1e-6)
    why = members.noise.why_not_late
    spanned = {"residual": "aten.add", "in place": "aten.add_", "concatenation": "aten.cat", "fixed rows": "fixes its number of rows"}
    assert (why is None) if kind not in spanned else spanned[kind] in why
    assert not torch.equal(outputs(net, image, "late", seed=1)[0], late)


def test_late_expansion_computes_what_lies_before_the_noise_once():
    net, rows = network("straight"), []
    net[0].register_forward_hook(lambda *call: rows.append(len(call[2])))
    net[-1].register_forward_hook(lambda *call: rows.append(len(call[2])))
    outputs(net, torch.rand(5, 3, 2, 2), "late")
    assert rows == [1, 2, 5, 30], "two rows to look whether a skip spans the noise, then 5 pictures and 6 members of each"


@pytest.mark.parametrize("expand", ["late", "input", "loop"])
@pytest.mark.parametrize("split", [[7], [1, 6], [3, 3, 1]])
def test_a_sample_has_the_same_masks_in_any_batch(expand, split):
    net, image, order = network("two dropouts"), torch.rand(7, 3, 2, 2), torch.randperm(7)
    views = [HorizontalFlip(), MCDropout(4)]
    whole, _ = outputs(net, image, "late", views)
    parts = torch.cat([outputs(net, part, expand, views)[0] for part in image[order].split(split)])
    torch.testing.assert_close(parts, whole[order], rtol=1e-5, atol=1e-6)


def test_masks_drop_with_probability_p_and_keep_the_mean():
    """A dropout alone: the mean over members is the input, within five standard errors sqrt(p / (1 - p) / n)."""
    net, n = nn.Sequential(nn.Flatten(), nn.Dropout(0.25)).eval(), 4000
    with marginalized(net, [MCDropout(n)]) as members:
        noise = members.noise.members(lambda x: net[1](x), torch.ones(2, 5), torch.arange(2 * n).view(n, 2))
    assert noise.unique().tolist() == pytest.approx([0, 4 / 3])
    assert ((noise.mean(0) - 1).abs() < 5 * (0.25 / 0.75 / n) ** 0.5).all()
    assert not torch.equal(noise[:, 0], noise[:, 1])


def test_dropconnect_members_are_equal_late_and_in_a_loop_and_leave_the_layer_as_it_was():
    net, image = network("straight"), torch.rand(3, 3, 2, 2)
    plain = net(image)
    with inject(net, dropconnect=0.5):
        late, loop = (outputs(net, image, expand, [MCDropConnect(5)])[0] for expand in ("late", "loop"))
        torch.testing.assert_close(late, loop, rtol=1e-5, atol=1e-6)
        assert (late - plain.log_softmax(-1)).abs().max() > 1e-3
        assert not any(layer.training for layer in net.modules())
        assert net[-1].source.key is None
        assert torch.equal(net(image), plain)


def test_global_generators_are_neither_read_nor_moved():
    net, image, state = network("straight"), torch.rand(3, 3, 2, 2), torch.get_rng_state()
    outputs(net, image, "late")
    assert torch.equal(torch.get_rng_state(), state)


def test_views_that_find_nothing_or_cannot_be_keyed_are_all_named():
    net = nn.Sequential(nn.Flatten(), nn.AlphaDropout(0.5), nn.Linear(12, 3))
    with pytest.raises(ConfigurationError, match="2 problems") as caught, marginalized(net, [MCDropout(3), MCDropConnect(3)]):
        pass
    assert "cannot key AlphaDropout '1' by sample. Replace it with nn.Dropout" in str(caught.value)
    assert "MCDropConnect found no DropConnect layer with p > 0" in str(caught.value)


def test_a_layer_whose_first_axis_is_not_the_batch_is_refused_by_name():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(x.flatten(2).permute(2, 0, 1)).mean(0)

    net = Sequence().eval()
    with pytest.raises(UnsupportedLayerError, match="Layer 'drop' sees 4 rows for 10 pictures"):
        outputs(net, torch.rand(10, 3, 2, 2), "loop")
