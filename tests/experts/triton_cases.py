"""The Triton kernels against `naive`: outputs and every gradient.

Not collected by itself: `test_triton.py` runs this file in a process of its own, once in Triton's interpreter (which
must be chosen before Triton is imported) and, where there is one, on a GPU.
"""

import copy
import itertools

import pytest
import torch
import triton

from crossways.assignment import Assignment
from crossways.experts import Activation, Experts, compute_experts, why_not
from crossways.experts.triton.hidden_grad import hidden_grad_kernel
from crossways.experts.triton.layout import pad_widths
from crossways.experts.triton.op import backward, forward
from crossways.experts.triton.plan import num_tiles, pairs_of_tokens, plan_tiles
from crossways.experts.triton.rows import row_kernel
from crossways.experts.triton.up import up_kernel
from crossways.gates import LinearGate
from crossways.layers import MoE
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.score import Softmax
from crossways.rules.select import Capacity, ExpertChoice, GroupLimited, Sinkhorn, TopC, TopK, TopP

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative root-mean-square error against naive in float64. Triton's interpreter cuts float32 off to bfloat16, where a
# GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.5e-2, torch.float16: 2e-3}
NAMES = ("x", "weight", "up", "down")
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _loops_in_the_interpreter():
    """The interpreter of Triton 3.6 wants the integer of an array of one element, which NumPy refuses from 2.4 on."""
    if why_not("triton", torch.device("cpu"), torch.float32) is not None:
        yield
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    with pytest.MonkeyPatch.context() as change:
        change.setattr(interpreter, "_patch_lang_tensor", patch)
        yield


def random_mask(tokens, experts, density, seed=0):
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density


def top_k_mask(tokens, experts, k):
    scores_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    return torch.zeros(tokens, experts).scatter(1, scores_TE.topk(k).indices, 1.0).bool()


def ragged():
    """Empty experts 1 and 4, one hot expert, tokens 0 to 4 and 50 chose nobody."""
    mask_TE = random_mask(60, 6, 0.3)
    mask_TE[:, 2] = True
    mask_TE[:, [1, 4]] = False
    mask_TE[[0, 1, 2, 3, 4, 50]] = False
    return mask_TE


def hot():
    """Nine tokens in ten choose expert 3 of 5."""
    mask_TE = random_mask(50, 5, 0.05)
    mask_TE[:45, 3] = True
    return mask_TE


# Mask, D, F.
CASES = {
    "ragged": (ragged(), 60, 36),
    "hot": (hot(), 33, 65),
    "many-experts": (top_k_mask(4, 256, 8), 16, 8),
    "k-1": (top_k_mask(37, 4, 1), 17, 5),
    "all-experts": (torch.ones(17, 3, dtype=torch.bool), 16, 16),
    "one-expert": (torch.ones(33, 1, dtype=torch.bool), 1, 1),
    "one-token": (torch.tensor([[False, True, True, False]]), 64, 32),
    "nobody": (torch.zeros(9, 4, dtype=torch.bool), 16, 24),
    "wide": (random_mask(9, 3, 0.5), 40, 272),
    "three": (~torch.eye(3, dtype=torch.bool), 16, 16),
    "odd-widths": (random_mask(9, 3, 0.5), 67, 66),
    "no-tokens": (torch.zeros(0, 4, dtype=torch.bool), 16, 24),
}


def make_inputs(case, dtype, activation="swiglu"):
    """Leaves x, weight, up, down; values exact in bfloat16, so that every dtype computes the same problem."""
    mask_TE, width, expert_width = CASES[case]
    generator = torch.Generator().manual_seed(1)
    pairs, experts = int(mask_TE.sum()), mask_TE.shape[1]
    rows = expert_width * (2 if Activation(activation).gated else 1)
    shapes = ((len(mask_TE), width), (pairs,), (experts, rows, width), (experts, width, expert_width))
    scales = (1, 1, width**-0.5, expert_width**-0.5)
    return [
        (torch.randn(shape, generator=generator) * scale).bfloat16().to(DEVICE, dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def assignment_of(case, weight_P):
    mask_TE = CASES[case][0].to("cpu")
    made = Assignment.from_mask(mask_TE, torch.zeros(mask_TE.shape))
    return Assignment(
        made.token_P.to(DEVICE), made.expert_P.to(DEVICE), weight_P, made.offsets_E1.to(DEVICE), made.num_tokens
    )


def gradients(y, leaves):
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(DEVICE, y.dtype)
    return [y, *torch.autograd.grad(y, leaves, grad_y)]


def evaluate(case, leaves, backend="triton", activation="swiglu"):
    """Output and the gradients of all leaves."""
    x, weight, up, down = leaves
    y = compute_experts(x, assignment_of(case, weight), up, down, Activation(activation), backend)
    return gradients(y, leaves)


def reference(case, activation="swiglu"):
    return evaluate(case, make_inputs(case, torch.float64, activation), "naive", activation)


def assert_same(actual, expected, tolerance):
    for name, ours, theirs in zip(("y", *NAMES), actual, expected, strict=True):
        assert ours.shape == theirs.shape
        error = (ours.double() - theirs.double()).norm()
        limit = tolerance * theirs.double().norm()
        assert error <= limit, f"{name}: relative RMS {error / theirs.double().norm():.2e} > {tolerance}"


def test_it_runs_here():
    assert why_not("triton", DEVICE, torch.bfloat16) is None


SMALL = ("k-1", "one-expert", "one-token", "nobody", "no-tokens")
PROBLEMS = [(case, torch.float32) for case in CASES if case not in ("many-experts", "three", "wide")]
PROBLEMS += [("many-experts", torch.bfloat16), ("hot", torch.bfloat16), ("all-experts", torch.float16)]
PROBLEMS += itertools.product(SMALL, (torch.bfloat16, torch.float16))


@pytest.mark.parametrize(("case", "dtype"), PROBLEMS, ids=lambda value: str(value).removeprefix("torch."))
def test_output_and_gradients(case, dtype):
    actual = evaluate(case, make_inputs(case, dtype))
    assert actual[0].dtype == dtype
    assert_same(actual, reference(case), TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["geglu", "reglu", "silu", "gelu", "relu"])
def test_activations(activation):
    actual = evaluate("k-1", make_inputs("k-1", torch.float32, activation), activation=activation)
    assert_same(actual, reference("k-1", activation), TOLERANCE[torch.float32])


@pytest.mark.parametrize("wanted", range(4), ids=NAMES)
def test_each_gradient_alone(wanted):
    leaves = [
        leaf.detach().requires_grad_(index == wanted) for index, leaf in enumerate(make_inputs("k-1", torch.float32))
    ]
    x, weight, up, down = leaves
    y = compute_experts(x, assignment_of("k-1", weight), up, down, Activation("swiglu"), "triton")
    grad = gradients(y, [leaves[wanted]])[1]
    expected = reference("k-1")[1 + wanted]
    assert (grad - expected).norm() <= 2e-6 * expected.norm()


def test_without_gradients_nothing_is_kept():
    x, weight, up, down = make_inputs("k-1", torch.float32)
    assignment = assignment_of("k-1", weight)
    arguments = (x, weight, up, down, assignment.token_P, assignment.offsets_E1, "swiglu")
    y, before_PH, *_ = forward(*arguments, save=False)
    assert before_PH.numel() == 0
    kept, before_PH, *_ = forward(*arguments, save=True)
    assert before_PH.shape == (len(weight), up.shape[1])
    assert torch.equal(y, kept)


def test_the_same_bits_every_time():
    first, second = (evaluate("all-experts", make_inputs("all-experts", torch.bfloat16)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_strided_inputs():
    leaves = make_inputs("k-1", torch.float32)
    strided = [leaf.detach().mT.contiguous().mT.requires_grad_() if leaf.dim() > 1 else leaf for leaf in leaves]
    assert not strided[0].is_contiguous()
    assert_same(evaluate("k-1", strided), reference("k-1"), TOLERANCE[torch.float32])


def test_broadcast_output_gradients():
    leaves = make_inputs("k-1", torch.float32)
    x, weight, up, down = leaves
    y = compute_experts(x, assignment_of("k-1", weight), up, down, Activation("swiglu"), "triton")
    grads = torch.autograd.grad(y.sum(), leaves)  # a gradient of strides zero
    x, weight, up, down = leaves = make_inputs("k-1", torch.float64)
    y = compute_experts(x, assignment_of("k-1", weight), up, down, Activation("swiglu"), "naive")
    for grad, expected in zip(grads, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert (grad - expected).norm() <= 2e-6 * expected.norm()


def test_strided_routing_weights_and_tokens():
    x, weight, up, down = leaves = make_inputs("k-1", torch.float32)
    exact = assignment_of("k-1", weight)
    apart = torch.stack((weight, torch.full_like(weight, torch.nan)), 1)[:, 0]
    tokens = torch.stack((exact.token_P, exact.token_P.flip(0)), 1)[:, 0]
    assignment = Assignment(tokens, exact.expert_P, apart, exact.offsets_E1, exact.num_tokens)
    y = compute_experts(x, assignment, up, down, Activation("swiglu"), "triton")
    assert_same(gradients(y, leaves), reference("k-1"), TOLERANCE[torch.float32])


def test_vectors_that_begin_anywhere():
    """Slices of a longer buffer, not aligned to what a kernel loads at once."""
    leaves = [
        torch.cat((leaf.new_zeros(3), leaf.detach().flatten()))[3:].view(leaf.shape).requires_grad_()
        for leaf in make_inputs("all-experts", torch.float16)
    ]
    assert leaves[0].data_ptr() % 16
    assert_same(evaluate("all-experts", leaves), reference("all-experts"), TOLERANCE[torch.float16])


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_widths_that_are_not_whole_vectors_are_padded(activation):
    leaves = make_inputs("odd-widths", torch.bfloat16, activation)
    padded_x, padded_up, padded_down = pad_widths(leaves[0], *leaves[2:])
    rows = 2 if Activation(activation).gated else 1
    assert (padded_x.shape[1], padded_up.shape[1:], padded_down.shape[1:]) == (72, (rows * 72, 72), (72, 72))
    actual = evaluate("odd-widths", leaves, activation=activation)
    assert_same(actual, reference("odd-widths", activation), TOLERANCE[torch.bfloat16])


def far_apart(tensor):
    """The same, with 2^30 elements between one row and the next; of that memory few pages are ever touched."""
    step = 2**30 + 16
    room = torch.empty((len(tensor) - 1) * step + tensor[0].numel(), dtype=tensor.dtype, device=DEVICE)
    return room.as_strided(tensor.shape, (step, *tensor.stride()[1:])).copy_(tensor)


def test_offsets_beyond_32_bits():
    leaves = make_inputs("three", torch.float16)
    far = [far_apart(leaf.detach()).requires_grad_() if leaf.dim() > 1 else leaf for leaf in leaves]
    assert_same(evaluate("three", far), reference("three"), TOLERANCE[torch.float16])


@pytest.mark.parametrize("columns", [64, 256])
def test_wide_tiles(columns, monkeypatch):
    """Which the interpreter is not given by itself: columns are worked on in several pieces."""
    config = triton.Config({"BLOCK_N": columns, "BLOCK_K": 32, "GROUP_M": 8}, num_warps=8, num_stages=2)
    for kernel in (up_kernel, row_kernel, hidden_grad_kernel):
        monkeypatch.setattr(kernel, "early_config_prune", lambda *_, **__: [config])
        monkeypatch.setattr(kernel, "cache", {})
    assert_same(evaluate("wide", make_inputs("wide", torch.float16)), reference("wide"), TOLERANCE[torch.float16])


def test_float32_weights_and_autocast():
    leaves = make_inputs("k-1", torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        actual = evaluate("k-1", leaves)
    assert {tensor.dtype for tensor in actual} == {torch.float32}
    assert_same(actual, reference("k-1"), TOLERANCE[torch.bfloat16])


def test_slack_takes_no_part_and_uninitialised_memory_is_not_read(monkeypatch):
    mask_TE, *_ = CASES["ragged"]
    leaves = make_inputs("ragged", torch.float32)
    pairs, cells = int(mask_TE.sum()), mask_TE.numel()
    assert cells > pairs + 16
    longer = torch.zeros(mask_TE.shape, device=DEVICE)
    exact = assignment_of("ragged", leaves[1])
    longer = longer.index_put((exact.token_P, exact.expert_P), leaves[1])
    slack = Assignment.from_bounded_mask(mask_TE.to(DEVICE), longer, most=cells)
    assert slack.num_pairs == cells
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    x, _, up, down = leaves
    y = compute_experts(x, slack, up, down, Activation("swiglu"), "triton")
    actual = gradients(y, leaves)
    monkeypatch.undo()
    assert_same(actual, reference("ragged"), TOLERANCE[torch.float32])


def test_second_derivatives_are_refused():
    leaves = make_inputs("k-1", torch.float32)
    x, weight, up, down = leaves
    y = compute_experts(x, assignment_of("k-1", weight), up, down, Activation("swiglu"), "triton")
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(grad_x.sum(), up)


def test_backward_refuses_what_was_not_kept():
    x, weight, up, down = (leaf.detach() for leaf in make_inputs("k-1", torch.float32))
    assignment = assignment_of("k-1", weight)
    segments = (assignment.token_P, assignment.offsets_E1)
    y, *kept = forward(x, weight, up, down, *segments, "swiglu", save=False)
    with pytest.raises(RuntimeError, match="0 of 37 pairs were kept"):
        backward(y, x, weight, up, down, *segments, *kept, "swiglu", [True] * 4)


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("case", ["ragged", "many-experts", "nobody"])
def test_tiles_cover_every_pair_once(case, rows):
    mask_TE = CASES[case][0]
    exact = assignment_of(case, torch.zeros(int(mask_TE.sum()), device=DEVICE))
    tiles = plan_tiles(exact.offsets_E1, exact.num_pairs, rows)
    assert len(tiles.expert_G) == num_tiles(exact.num_pairs, mask_TE.shape[1], rows)
    end_E = exact.offsets_E1[1:].tolist()
    seen = []
    for expert, row in zip(tiles.expert_G.tolist(), tiles.row_G.tolist(), strict=True):
        if expert >= 0:
            pairs = range(row, min(row + rows, end_E[expert]))
            seen += [(pair, expert) for pair in pairs]
    assert seen == list(enumerate(exact.expert_P.tolist()))


def test_every_token_finds_its_pairs_in_order():
    mask_TE = CASES["ragged"][0]
    weights = torch.rand(mask_TE.shape)
    slack = Assignment.from_bounded_mask(mask_TE.to(DEVICE), weights.to(DEVICE), most=mask_TE.numel())
    pairs = pairs_of_tokens(slack.token_P, slack.offsets_E1, len(mask_TE))
    start = pairs.start_T1.tolist()
    for token, (begin, end) in enumerate(itertools.pairwise(start)):
        mine = slack.expert_P[pairs.pair_P[begin:end]].cpu()
        assert torch.equal(mine, mask_TE[token].nonzero()[:, 0])
    assert start[-1] == int(mask_TE.sum())


def layer(select):
    torch.manual_seed(0)
    gate = LinearGate(16, 4)
    gate.reset_parameters(std=1.0)
    experts = Experts(4, 16, 8, backend="triton")
    experts.reset_parameters(std=0.5)
    return MoE(Router(4, Softmax(), select, gate=gate), experts).to(DEVICE)


def layer_step(run, model, padded):
    torch.manual_seed(1)
    x_BSD = torch.randn(2, 7, 16, device=DEVICE)
    valid_BS = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    valid_BS[1, 4:] = False
    y_BSD = run(x_BSD, valid_BS if padded else None)
    y_BSD.square().sum().backward()
    return [y_BSD.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("select", "padded"),
    [(TopK(2), False), (TopK(2), True), (Capacity(k=2, factor=1.0), True), (TopC(1.5), True)],
    ids=["top-k", "top-k-padded", "capacity-padded", "top-c-padded"],
)
def test_a_layer_compiles_without_graph_break(select, padded):
    torch._dynamo.reset()
    eager, compiled = layer(select), layer(select)

    def run(model):
        return lambda x_BSD, valid_BS: model(x_BSD, contexts=[Context(valid_BS=valid_BS)])[0]

    expected = layer_step(run(eager), eager, padded)
    graph = torch.compile(run(compiled), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(layer_step(graph, compiled, padded), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_operators_tell_torch_the_truth():
    """Shapes and dtypes that `torch.compile` assumes are those that the kernels give."""
    leaves = make_inputs("k-1", torch.float32)
    assignment = assignment_of("k-1", leaves[1])
    arguments = (*leaves, assignment.token_P, assignment.offsets_E1, "swiglu", True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward, arguments, test_utils=tests)
    y, *kept = forward(*(leaf.detach() for leaf in leaves), *arguments[4:])
    inputs = (torch.ones_like(y), *(leaf.detach() for leaf in leaves), *arguments[4:6], *kept)
    torch.library.opcheck(backward, (*inputs, "swiglu", [True, False, True, True]), test_utils=tests[:2])


def test_checkpointing_recomputes_the_same():
    plain, again = layer(TopK(2)), layer(TopK(2))
    expected = layer_step(lambda x, _: plain(x)[0], plain, False)

    def run(x_BSD, _):
        return torch.utils.checkpoint.checkpoint(lambda x: again(x)[0], x_BSD, use_reentrant=False)

    for ours, theirs in zip(layer_step(run, again, False), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_copy_of_the_layer_works():
    model = layer(TopK(2))
    clone = copy.deepcopy(model)
    first, second = (layer_step(lambda x, _, m=m: m(x)[0], m, False) for m in (model, clone))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    "select",
    [GroupLimited(k=2, n_group=2, topk_group=1), ExpertChoice(1), TopP(p=0.5, cap=2)],
    ids=lambda rule: rule.name,
)
def test_other_bounded_rules_are_one_graph(select):
    torch._dynamo.reset()
    model = layer(select)
    explained = torch._dynamo.explain(lambda x_BSD: model(x_BSD)[0])(torch.randn(2, 7, 16, device=DEVICE))
    assert explained.graph_break_count == 0


def test_sinkhorn_breaks_the_graph():
    torch._dynamo.reset()
    model = layer(Sinkhorn(2))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(lambda x_BSD: model(x_BSD)[0], fullgraph=True, backend="eager")(
            torch.randn(2, 7, 16, device=DEVICE)
        )
