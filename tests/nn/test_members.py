import pytest
import torch
from torch import nn

from lightning_cnn.nn.members import answering_together, log_mean_probability


def test_the_answer_is_a_logit_of_the_mean_probability():
    logits = torch.randn(3, 5, 4)
    torch.testing.assert_close(log_mean_probability(list(logits)).softmax(-1), logits.softmax(-1).mean(0))


def test_a_network_answers_for_all_members_and_is_itself_again_after_an_exception():
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    members = [{name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()} for _ in range(2)]
    alone = model(x)
    each = [nn.functional.linear(x, member["weight"], member["bias"]) for member in members]
    with pytest.raises(KeyError), answering_together(model, members) as calls:
        torch.testing.assert_close(model(x), log_mean_probability(each))
        assert calls == [1]
        raise KeyError
    assert torch.equal(model(x), alone)
