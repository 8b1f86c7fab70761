"""Measurements that are kept, and found again only for the very same thing."""

import pytest
import torch

from crossways.tuning.store import Store, model_digest


def test_a_kept_value_is_not_measured_again(tmp_path):
    store = Store(tmp_path, {"model": "a"})
    assert store.get({"what": 1}, lambda: [0.1, None]) == [0.1, None]
    again = Store(tmp_path, {"model": "a"})
    assert again.get({"what": 1}, lambda: pytest.fail("measured again")) == [0.1, None]
    assert (store.repeated, again.repeated) == (0, 1)


@pytest.mark.parametrize(("common", "key"), [({"model": "b"}, {"what": 1}), ({"model": "a"}, {"what": 2})])
def test_anything_else_is_measured(tmp_path, common, key):
    Store(tmp_path, {"model": "a"}).get({"what": 1}, lambda: "old")
    assert Store(tmp_path, common).get(key, lambda: "new") == "new"


def test_a_measurement_that_fails_leaves_nothing(tmp_path):
    store = Store(tmp_path, {})
    with pytest.raises(ZeroDivisionError):
        store.get({"what": 1}, lambda: 1 / 0)
    assert not list(tmp_path.iterdir())


def test_the_digest_of_a_model_follows_weights_and_configuration(olmoe):
    before = model_digest(olmoe)
    assert model_digest(olmoe) == before
    olmoe.config.num_experts_per_tok = 3
    assert model_digest(olmoe) != before
    olmoe.config.num_experts_per_tok = 4
    with torch.no_grad():
        olmoe.model.layers[2].mlp.experts.down_proj[7, -1, -1] += 1e-3
    assert model_digest(olmoe) != before
