"""Average over test-time noise, and say how much the members disagree: entropy, expected entropy, mutual information (in nats).

Entropy of the mean is all the uncertainty there is; expected entropy is what each member is unsure of by itself (the picture);
their difference, the mutual information, is what the members disagree about (the network).

Source: CS231n 2016, lecture 11, "Convolutional neural networks in practice" (training adds noise, testing marginalises over it);
Gal & Ghahramani 2016, arXiv:1506.02142; Houlsby et al. 2011, arXiv:1112.5745 (mutual information).
"""

from functools import lru_cache
from math import log

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from lightning_cnn.functional import counter


def log_mean_prob(log_prob: Float[Tensor, "k b c"]) -> Float[Tensor, "b c"]:
    """The logarithm of the members' mean probability: a valid logit, so losses, argmax and metrics need no change.

    >>> log_mean_prob(torch.tensor([[[0.2, 0.8]], [[0.6, 0.4]]]).log()).exp()
    tensor([[0.4000, 0.6000]])
    """
    return log_prob.logsumexp(0) - log(len(log_prob))


def entropy(log_prob: Float[Tensor, "*b c"]) -> Float[Tensor, "*b"]:
    """Minus the mean log probability, in [0, log c] nats; a class with probability zero adds nothing."""
    return torch.special.entr(log_prob.exp()).sum(-1)


def expected_entropy(log_prob: Float[Tensor, "k b c"]) -> Float[Tensor, " b"]:
    """Mean entropy of the members."""
    return entropy(log_prob).mean(0)


def mutual_information(log_prob: Float[Tensor, "k b c"]) -> Float[Tensor, " b"]:
    """How much the members disagree: zero when all are equal, never negative, and at most log k."""
    return (entropy(log_mean_prob(log_prob)) - expected_entropy(log_prob)).clamp(min=0)


def content_index(image: Shaped[Tensor, "b ..."]) -> Int64[Tensor, " b"]:
    """A 31-bit number of each picture's content, for keying noise by sample where a batch does not say which samples it holds.

    Equal pictures get equal numbers in any batch, layout, order or process; a picture that differs in one element gets another.
    """
    flat = image.detach().reshape(len(image), -1)
    size = flat.element_size()
    words = flat.view(torch.int32 if size >= 4 else (torch.int16 if size == 2 else torch.uint8)).to(torch.int32)
    total = (words * _odd_words(words.shape[1], words.device)).sum(1, dtype=torch.int64)
    return counter.bits(0, total).long() & 0x7FFFFFFF


def row_index(key: int, sample: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
    """A 31-bit number of each sample for one member: what the member's masks are drawn from."""
    return counter.bits(key, sample).long() & 0x7FFFFFFF


@lru_cache(maxsize=8)
def _odd_words(n: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return counter.bits(counter.key(0, "content"), torch.arange(n, device=device)) | 1
