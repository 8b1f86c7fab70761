"""Likelihood of windows, against sums worked out by hand."""

import math

import pytest
import torch
from torch import nn

from crossways.evaluation.perplexity import Likelihood, score_batches
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.training.windows import batch_windows, evaluation_windows


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CrosswaysForCausalLM(
        CrosswaysConfig(
            vocab_size=11,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_experts=4,
            moe_intermediate_size=8,
            max_position_embeddings=32,
            initializer_range=0.5,
            select={"name": "top_c", "k": 1.5},
        )
    )


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 11, (n,), generator=generator).tolist() for n in (7, 1, 12)]


def windows(size=32, stride=32):
    return evaluation_windows(documents(), [10, 1, 20], size, stride, bos_id=0)


def test_perplexity_and_bits_are_those_of_the_total():
    seen = Likelihood(nats=20 * math.log(8), tokens=20, routed_tokens=23, expert_load=())
    assert seen.perplexity == pytest.approx(8)
    assert seen.bits_per_byte(30) == pytest.approx(2)  # 60 bits over 30 bytes
    assert seen.budget is None
    assert Likelihood(1e6, 1, 1, ()).perplexity == math.inf


def test_the_budget_is_pairs_per_token_and_router():
    loads = (torch.tensor([4, 2]), torch.tensor([1, 1]))
    assert Likelihood(0.0, 1, 4, loads).budget == 1.0


def test_a_model_that_knows_nothing_scores_log_v(model):
    nn.init.zeros_(model.lm_head.weight)
    seen = score_batches(model, batch_windows(windows().windows, 2, pad_id=0))
    assert seen.tokens == 20
    assert seen.nats == pytest.approx(20 * math.log(11), rel=1e-6)


def test_batching_and_padding_change_nothing_and_each_token_counts_once(model):
    scored = [score_batches(model, batch_windows(windows().windows, size, pad_id=3)) for size in (1, 3)]
    by_hand = 0.0
    for document in documents():
        ids = torch.tensor([[0, *document]])
        logprobs = model.eval()(ids).logits.log_softmax(-1)[0, :-1]
        by_hand -= logprobs.gather(-1, ids[0, 1:, None]).sum().item()
    for seen in scored:
        assert seen.nats == pytest.approx(by_hand, rel=1e-5)
        assert (seen.tokens, seen.routed_tokens) == (20, 23)
        assert seen.budget == pytest.approx(sum(math.floor(1.5 * n + 0.5) for n in (8, 2, 13)) / 23)


def test_a_leaky_rule_and_its_twin_differ_and_the_mode_is_restored(model):
    model.train()
    model(torch.randint(0, 11, (2, 8)))  # estimates the cutoffs
    batches = list(batch_windows(windows().windows, 2, pad_id=0))
    leaky, causal = score_batches(model, batches), score_batches(model, batches, causal=True)
    assert leaky.nats != causal.nats
    assert model.training


def test_bfloat16_is_close(model):
    batches = list(batch_windows(windows().windows, 2, pad_id=0))
    model.eval()
    full, low = score_batches(model, batches), score_batches(model, batches, dtype=torch.bfloat16)
    assert low.nats == pytest.approx(full.nats, rel=0.05)
    assert low.nats != full.nats


def test_a_shorter_stride_gives_more_context_not_more_tokens(model):
    model.config.causal_routing = False
    seen = {stride: score_batches(model, batch_windows(windows(6, stride).windows, 4, 0)) for stride in (6, 2)}
    assert seen[6].tokens == seen[2].tokens == 20
    assert seen[2].routed_tokens > seen[6].routed_tokens
