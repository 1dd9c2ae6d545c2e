"""Counter-based noise: one function, four implementations, no visible pattern."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lightning_cnn.functional import counter
from lightning_cnn.kernels import counter as kernel

keys = st.integers(0, 2**63 - 1)
indices = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8)


@given(keys, indices)
def test_torch_numpy_and_numba_agree_bit_for_bit(key, index):
    array = np.array(index, dtype=np.int64)
    expected = kernel.bits_array(key, array)
    tensor = torch.from_numpy(array)
    assert np.array_equal(counter.bits(key, tensor).numpy().view(np.uint32), expected), "compiled"
    with FlopCounterMode(display=False):  # under any mode, torch's operations
        assert np.array_equal(counter.bits(key, tensor).numpy().view(np.uint32), expected), "torch"
    assert [kernel.bits(key, np.uint64(i & (2**64 - 1))) for i in index] == expected.tolist()


def test_a_tensor_key_gives_the_bits_of_its_integer():
    index = torch.arange(100)
    for key in (0, 1, 2**31, 2**63 - 1, counter.key(3, "order", 5)):
        assert torch.equal(counter.bits(torch.tensor(key), index), counter.bits(key, index))


def test_a_step_in_a_tensor_gives_the_key_of_its_integer():
    steps = [0, 1, 2**31, -1, 2**62]
    expected = [counter.key(3, "rounding", "conv.weight", step) for step in steps]
    assert counter.key_at(3, "rounding", "conv.weight", step=torch.tensor(steps)).tolist() == expected


def test_a_vmapped_or_transposed_index_gives_its_own_bits():
    index = torch.arange(12).view(3, 4)
    expected = counter.bits(7, index)
    assert torch.equal(torch.vmap(lambda i: counter.bits(7, i))(index), expected)
    assert torch.equal(counter.bits(7, index.T), expected.T)


def test_int32_and_int64_indices_name_the_same_samples():
    index = torch.tensor([0, 1, 2**31 - 1, -1, -(2**31)])
    assert torch.equal(counter.bits(7, index), counter.bits(7, index.int()))


def test_permutation_is_one_and_the_same_in_torch_and_numpy():
    order = counter.permutation(counter.key(0, "order", 1), 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert np.array_equal(order.numpy(), kernel.permutation(counter.key(0, "order", 1), 1000))
    assert not torch.equal(order, counter.permutation(counter.key(0, "order", 2), 1000))


def test_every_bit_is_fair_over_steps_and_elements():
    """Each of 32 bits: |z| < 5 over 2^20 draws; the chance that a fair source fails is 32 * 2 * 6e-7 = 4e-5 a row."""
    index = torch.arange(2**20)
    for key in (0, counter.key(0, "a"), counter.key(1, "a"), counter.key(0, "a", 1)):
        word = counter.bits(key, index)
        for bit in range(32):
            ones = ((word >> bit) & 1).sum().item()
            assert abs(ones - 2**19) / (2**20 * 0.25) ** 0.5 < 5, (key, bit)


@pytest.mark.parametrize("other", [(0, 1), (1, 0)], ids=["next element", "next step"])
def test_neighbours_are_not_correlated(other):
    """Correlation of uniforms between neighbouring elements and steps: |z| < 5."""
    step, element = other
    index = torch.arange(2**20)
    a = counter.uniform(counter.key(0, "noise", 0), index).double() - 0.5
    b = counter.uniform(counter.key(0, "noise", step), index + element).double() - 0.5
    assert abs((a * b).mean().item() * 12 * 2**10) < 5


def test_moments_of_uniform_and_normal():
    """First two moments within five standard errors of 2^20 draws."""
    n, index = 2**20, torch.arange(2**20)
    u, z = counter.uniform(5, index).double(), counter.normal(5, index).double()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5


def test_compiling_changes_no_bit_and_a_new_step_is_no_new_program():
    index = torch.arange(4096)

    @torch.compile(fullgraph=True)
    def noise(step: torch.Tensor) -> torch.Tensor:
        return counter.bits(counter.key_at(0, "rounding", step=step), index)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            assert torch.equal(noise(torch.tensor(step)), counter.bits(counter.key(0, "rounding", step), index))


def test_triton_agrees_under_the_interpreter(triton_interpreter):
    triton_interpreter(
        """
        import torch, triton, triton.language as tl
        from lightning_cnn.functional import counter
        from lightning_cnn.kernels import counter_triton

        @triton.jit
        def kernel(key_ptr, out_ptr, start, n: tl.constexpr):
            offset = tl.arange(0, n)
            tl.store(out_ptr + offset, counter_triton.bits(tl.load(key_ptr), start + offset.to(tl.int64)).to(tl.int32, bitcast=True))

        for start in (0, 2**31 - 8, 2**40):
            for key in (0, 2**63 - 1, counter.key(1, "a")):
                out = torch.empty(64, dtype=torch.int32)
                kernel[(1,)](torch.tensor(key), out, start, 64)
                assert torch.equal(out, counter.bits(key, start + torch.arange(64))), (start, key)
        """
    )
