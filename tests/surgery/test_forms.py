"""What a router says of its choice."""

import pytest
import torch

from crossways.errors import UserError
from crossways.surgery.forms import logits_behind

LOGITS = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 0.1]])


def test_logits_behind_probabilities():
    probs_TE = LOGITS.softmax(-1)
    assert torch.equal(logits_behind(probs_TE, LOGITS.view(1, 2, 3), "the router's classifier"), LOGITS)
    torch.testing.assert_close(logits_behind(probs_TE, None, "").softmax(-1), probs_TE)


def test_what_does_not_belong_together_is_refused_with_what_to_do():
    with pytest.raises(UserError, match=r"no longer those of layer 1's classifier .* before rerouting"):
        logits_behind(LOGITS.softmax(-1), LOGITS + torch.tensor([1.0, 0.0, 0.0]), "layer 1's classifier")
