"""The context manager: what it puts on, how perturbations act together, and that it restores."""

from __future__ import annotations

import pytest
import torch

from crossways.perturb import DisableTop, DropExperts, LogitNoise, PermuteExperts, perturbed
from crossways.sites import router_sites, routers_per_layer
from crossways.trace import traced


def masks(model, ids_BS):
    return [routing.assignment.to_mask() for routing in model(ids_BS, output_routings=True).routings]


def test_every_perturbation_changes_the_output_and_is_undone_exactly(tiny, ids_BS):
    model = tiny()
    before = model(ids_BS).logits
    for perturbation in (DisableTop(), LogitNoise(0.5), DropExperts(0.25), PermuteExperts(1)):
        with perturbed(model, perturbation):
            assert not torch.equal(model(ids_BS).logits, before), perturbation
        assert torch.equal(model(ids_BS).logits, before)
    assert all(site.router.perturbation is None for site in router_sites(model))


def test_an_error_inside_restores_and_passes_on(tiny):
    model = tiny()
    with pytest.raises(KeyError), perturbed(model, DisableTop()):
        raise KeyError("inside")
    assert all(site.router.perturbation is None for site in router_sites(model))


def test_a_context_in_which_nothing_happened_is_an_error(tiny, ids_BS):
    model = tiny()
    with pytest.raises(ValueError, match=r"DisableTop.*changed nothing"), perturbed(model, DisableTop()):
        pass
    with pytest.raises(ValueError, match="no router"), perturbed(torch.nn.Linear(1, 1), DisableTop()):
        pass
    with pytest.raises(ValueError, match="no perturbation"), perturbed(model):
        pass
    dense = tiny(moe_every=0)
    with pytest.raises(ValueError, match="no router"), perturbed(dense, DisableTop()):
        dense(ids_BS)


def test_together_they_act_by_stage_in_any_order_and_nested(tiny, ids_BS):
    model = tiny()
    noise, top, permute = LogitNoise(1.0, seed=3), DisableTop(), PermuteExperts(seed=5)

    def logits(*perturbations):
        with perturbed(model, *perturbations):
            return model(ids_BS).logits

    together = logits(noise, top, permute)
    assert torch.equal(logits(permute, top, noise), together)
    with perturbed(model, permute), perturbed(model, top), perturbed(model, noise):
        assert torch.equal(model(ids_BS).logits, together)
    assert not torch.equal(logits(noise, top), together)
    assert not torch.equal(logits(top, permute), together)


def test_the_top_expert_is_disabled_under_the_noisy_logits_and_before_relabelling(tiny, ids_BS):
    """By hand at the first router: argsort of noisy logits, second best, then the permutation."""
    model = tiny(select={"name": "top_k", "k": 1})
    noise, permute = LogitNoise(2.0, seed=1), PermuteExperts(seed=2)
    with perturbed(model, noise):
        noisy_TE = model(ids_BS, output_routings=True).routings[0].logits_TE
    with perturbed(model, permute):
        plain = model(ids_BS, output_routings=True).routings[0]
    permutation = {
        int(e): int(f) for e, f in zip(plain.logits_TE.argmax(-1), plain.assignment.top_expert_T(), strict=True)
    }
    with perturbed(model, permute, DisableTop(), noise):
        executed_T = model(ids_BS, output_routings=True).routings[0].assignment.top_expert_T()
    second_T = noisy_TE.topk(2).indices[:, 1]
    known = [t for t in range(16) if int(second_T[t]) in permutation]
    assert len(known) >= 8
    assert [int(executed_T[t]) for t in known] == [permutation[int(second_T[t])] for t in known]


def test_noise_is_seeded_differs_between_calls_and_scales(tiny, ids_BS):
    model = tiny()

    def first_logits(noise, calls=1):
        with perturbed(model, noise):
            return [model(ids_BS, output_routings=True).routings[0].logits_TE for _ in range(calls)]

    plain_TE = model(ids_BS, output_routings=True).routings[0].logits_TE
    one, two = first_logits(LogitNoise(0.5), calls=2)
    again, other = first_logits(LogitNoise(0.5))[0], first_logits(LogitNoise(0.5, seed=1))[0]
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    assert not torch.equal(one, other)
    torch.testing.assert_close(first_logits(LogitNoise(1.5))[0] - plain_TE, 3 * (one - plain_TE))
    spread_TE = plain_TE.std(-1, correction=0, keepdim=True)
    relative_TE = first_logits(LogitNoise(0.5, relative=True))[0] - plain_TE
    torch.testing.assert_close(relative_TE, (one - plain_TE) * spread_TE)


def test_noise_has_the_stated_standard_deviation():
    from crossways.perturb.noise import seeded

    noise = torch.randn(20_000, generator=seeded(0, 0))
    assert abs(float(noise.std()) - 1) < 0.02
    others = torch.randn(20_000, generator=seeded(0, 1)), torch.randn(20_000, generator=seeded(1, 0))
    assert all(abs(float((noise * other).mean())) < 0.03 for other in others)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_dropped_experts_are_gone_for_all_tokens_and_the_rest_is_chosen_anew(tiny, ids_BS, share):
    model = tiny(select={"name": "top_k", "k": 1})
    drop = DropExperts(share, seed=4)
    kept = [drop.kept(index, 4) for index in range(3)]
    assert [int(kept_E.sum()) for kept_E in kept] == [4 - round(share * 4)] * 3
    with perturbed(model, drop):
        routings = model(ids_BS, output_routings=True).routings
    for kept_E, routing in zip(kept, routings, strict=True):
        best_T = routing.logits_TE.masked_fill(~kept_E, -torch.inf).argmax(-1)
        assert torch.equal(routing.assignment.top_expert_T(), best_T)


def test_padding_stays_without_experts_when_experts_are_dropped(tiny, ids_BS):
    model = tiny()
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, 5:] = 0
    for perturbation in (DropExperts(0.5), DisableTop(), LogitNoise(1.0), PermuteExperts()):
        with perturbed(model, perturbation):
            routings = model(ids_BS, attention_mask=mask_BS, output_routings=True).routings
        assert not any(routing.assignment.to_mask()[~mask_BS.flatten().bool()].any() for routing in routings)


def test_different_seeds_and_routers_lose_different_experts():
    lost = {tuple((~DropExperts(0.5, seed=seed).kept(index, 8)).tolist()) for seed in range(6) for index in range(6)}
    assert len(lost) > 15


def test_impossible_values_are_refused(tiny, ids_BS):
    for wrong in (lambda: LogitNoise(0.0), lambda: DropExperts(0.0), lambda: DropExperts(1.0), lambda: DisableTop(0)):
        with pytest.raises(ValueError, match="must"):
            wrong()
    model = tiny()
    for perturbation, message in (
        (DropExperts(0.1), "drop at least one"),
        (PermuteExperts(4), "1 to 3"),
        (PermuteExperts(0), "1 to 3"),
    ):
        with pytest.raises(ValueError, match=message), perturbed(model, perturbation):
            model(ids_BS)


def test_permuting_moves_tokens_and_weights_to_other_experts(tiny, ids_BS):
    model = tiny()
    plain = model(ids_BS, output_routings=True).routings
    with perturbed(model, PermuteExperts(seed=1)):
        permuted = model(ids_BS, output_routings=True).routings
    before_TE, after_TE = plain[0].assignment.to_dense(), permuted[0].assignment.to_dense()
    columns = {tuple(column.tolist()) for column in before_TE.t()}
    assert {tuple(column.tolist()) for column in after_TE.t()} == columns
    assert not torch.equal(before_TE, after_TE)


def test_as_many_layers_are_permuted_as_asked(tiny):
    sites = router_sites(tiny(num_hidden_layers=6, layer="cartesian"))
    assert routers_per_layer(sites) == 2
    subsets = set()
    for seed in range(12):
        chosen = PermuteExperts(2, seed=seed).chosen_layers(sites)
        assert len(chosen) == 2
        bound = PermuteExperts(2, seed=seed).bind(sites)
        assert [apply is not None for apply in bound] == [site.layer in chosen for site in sites]
        subsets.add(tuple(chosen))
    assert len(subsets) > 4


def test_permutations_are_independent_unless_common():
    from crossways.perturb.noise import seeded
    from crossways.perturb.permute import random_permutation

    drawn = [tuple(random_permutation(2, seeded(seed, 0)).tolist()) for seed in range(10)]
    assert set(drawn) == {(1, 0)}  # never the identity


def test_one_permutation_for_all_layers_gives_the_same_map(tiny, ids_BS):
    model = tiny(select={"name": "top_k", "k": 4})  # all experts, so weights tell the map apart

    def maps(common):
        with perturbed(model, PermuteExperts(common=common, seed=3)):
            routings = model(ids_BS, output_routings=True).routings
        return [
            tuple(int((routing.assignment.to_dense()[0] == score).nonzero()) for score in routing.scores_TE[0])
            for routing in routings
        ]

    assert len(set(maps(True))) == 1
    assert len(set(maps(False))) > 1


def test_a_trace_sees_what_the_perturbation_made(tiny, ids_BS):
    model = tiny()
    with traced(model) as free:
        model(ids_BS)
    with perturbed(model, DisableTop(2)), traced(model) as trace:
        model(ids_BS)
    assert (trace.load_RE[0] + free.load_RE[0]).tolist() == [16] * 4  # two of four are disabled, the others run
    assert trace.budget_RK[:, 2].tolist() == [16, 16, 16]


def test_layers_that_repeat_a_decision_repeat_its_permutation_and_are_not_drawn(tiny, ids_BS):
    model = tiny(num_hidden_layers=4, sharing={"name": "decision", "size": 2})
    sites = router_sites(model)
    assert [site.reuses for site in sites] == [False, True, False, True]
    assert {layer for seed in range(9) for layer in PermuteExperts(1, seed=seed).chosen_layers(sites)} == {0, 2}
    with pytest.raises(ValueError, match="1 to 2"):
        PermuteExperts(3).chosen_layers(sites)
    with perturbed(model, PermuteExperts(seed=1)):
        first, second, *_ = masks(model, ids_BS)
    assert torch.equal(first, second)
    assert not torch.equal(first, masks(model, ids_BS)[0])
