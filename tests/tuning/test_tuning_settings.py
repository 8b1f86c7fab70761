"""What a tuning may be asked."""

import math

import pytest
from pydantic import ValidationError

from crossways.errors import UserError
from crossways.tuning.settings import TuningSettings, loss_limit


@pytest.mark.parametrize(
    ("text", "nats"),
    [("1%", math.log(1.01)), (" 2.5 % ", math.log(1.025)), ("0.01nats", 0.01), (".5 nats", 0.5), ("0%", 0.0)],
)
def test_a_limit_is_of_perplexity_or_in_nats(text, nats):
    assert loss_limit(text).nats == pytest.approx(nats)


@pytest.mark.parametrize("text", ["1", "", "-1%", "one%", "1% of it", "nats", "0.01 bits", "1e3%"])
def test_any_other_limit_is_refused(text):
    with pytest.raises(UserError, match="expected a share of perplexity such as 1%"):
        loss_limit(text)


@pytest.mark.parametrize(
    ("field", "value"), [("families", ("usmo",)), ("families", ()), ("levels", (1.0,)), ("budgets", (0.0,))]
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        TuningSettings(**{field: value})
