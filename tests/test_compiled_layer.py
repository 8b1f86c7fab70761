"""`torch.compile` on a whole layer: one graph where a rule's pairs have a bound, else a reason where it breaks."""

import pytest
import torch
from torch import nn

from crossways.experts import Experts, why_not
from crossways.gates import LinearGate
from crossways.layers import MoE
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.score import Softmax
from crossways.rules.select import (
    Base,
    Capacity,
    ExpertChoice,
    GroupLimited,
    Positive,
    SampledTopK,
    ScheduledTopK,
    Sinkhorn,
    Threshold,
    TopC,
    TopK,
    TopP,
)

pytestmark = pytest.mark.skipif(
    why_not("fused", torch.device("cpu"), torch.float32) is not None,
    reason=str(why_not("fused", torch.device("cpu"), torch.float32)),
)
FIXED_K = {
    "top-1": TopK(1),
    "top-2": TopK(2),
    "group-limited": GroupLimited(k=2, n_group=2, topk_group=1),
    "scheduled": ScheduledTopK(k=1, k_end=2, steps=10),
    "sampled": SampledTopK(k=2),
}
BOUNDED = {
    "capacity": Capacity(k=2),
    "capacity by score": Capacity(k=2, factor=0.7, order="score"),
    "without a limit": Capacity(k=2, factor=None),
    "sampled second choice": Capacity(k=2, order="token", second="random", normalize=True),
    "top-c": TopC(1.5),
    "top-c by position": TopC(1.5, group="position"),
    "expert choice": ExpertChoice(1),
    "top-p with a cap": TopP(p=0.5, cap=2),
}
RAGGED = {
    "positive": (Positive(), "any number of pairs"),
    "threshold": (Threshold(value=0.2), "any number of pairs"),
    "top-p": (TopP(p=0.5), "any number of pairs"),
    "sinkhorn": (Sinkhorn(2), "when it has converged"),
    "base": (Base(), "on the CPU"),
}


def layer(rule):
    torch.manual_seed(0)
    model = MoE(Router(4, Softmax(), rule, gate=LinearGate(16, 4)), Experts(4, 16, 8))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.train()


def step(run, model, padded):
    torch.manual_seed(1)
    x_BSD = torch.randn(2, 7, 16)
    valid_BS = torch.ones(2, 7, dtype=torch.bool)
    valid_BS[1, 4:] = False
    y_BSD = run(x_BSD, valid_BS if padded else None)
    y_BSD.square().sum().backward()
    return [y_BSD.detach(), *(parameter.grad for parameter in model.parameters())]


def forward_of(model):
    return lambda x_BSD, valid_BS: model(x_BSD, contexts=[Context(valid_BS=valid_BS)])[0]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", [*FIXED_K, *BOUNDED])
def test_a_training_step_is_one_graph(name, padded):
    torch._dynamo.reset()
    rule = (FIXED_K | BOUNDED)[name]
    eager, compiled = layer(rule), layer(rule)
    graph = torch.compile(forward_of(compiled), fullgraph=True, backend="aot_eager")
    ours = step(graph, compiled, padded)
    if "sampled" in name:  # draws other numbers in a graph
        assert all(one.isfinite().all() for one in ours)
        return
    for one, other in zip(ours, step(forward_of(eager), eager, padded), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RAGGED)
def test_where_the_graph_breaks_it_says_why(name):
    rule, reason = RAGGED[name]
    torch._dynamo.reset()
    model = layer(rule)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=reason):
        step(torch.compile(forward_of(model), fullgraph=True, backend="eager"), model, False)
    torch._dynamo.reset()
    eager, broken = layer(rule), layer(rule)
    graph = torch.compile(forward_of(broken), backend="aot_eager")
    for one, other in zip(step(graph, broken, True), step(forward_of(eager), eager, True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED_K)
def test_the_default_compiler_computes_the_same(name):
    torch._dynamo.reset()
    eager, compiled = layer(FIXED_K[name]).eval(), layer(FIXED_K[name]).eval()
    graph = torch.compile(forward_of(compiled), fullgraph=True)
    for one, other in zip(step(graph, compiled, True), step(forward_of(eager), eager, True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
