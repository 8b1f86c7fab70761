"""Who computes: the dense network, our backends, transformers' implementations, and peers with packages of their own.

A contender is made by a function of a `Problem`; where it cannot take part, the function raises `AbsentError`, and
the table says why. MegaBlocks, ScatterMoE and SonicMoE are wired as their sources document it; they run on CUDA
devices alone and have not been run with this file yet.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from crossways.experts import why_not
from crossways.experts.peers import PREFIX
from problems import Contender, Problem, crossways_contender

DENSE = "dense"
OURS = {"cpu": ("fused", "loop", "grouped_mm"), "cuda": ("triton", "grouped_mm")}
PEERS = {
    "cpu": tuple(PREFIX + name for name in ("grouped_mm", "eager", "batched_mm")),
    "cuda": (*(PREFIX + name for name in ("grouped_mm", "sonicmoe")), "scattermoe", "megablocks", "sonicmoe"),
}
BATCHED_LIMIT = 2**28
"""`batched_mm` copies an expert's matrices for every pair; it is left out where that takes more bytes than this."""
EAGER_LIMIT = 2**33
"""Each of `eager`'s experts fills a gradient as large as all matrices; no backward where that is more bytes."""


class AbsentError(RuntimeError):
    """A contender does not take part; the message says why."""


def dense(problem: Problem) -> Contender:
    """A SwiGLU network as wide as a token's experts together."""
    x_TD, width, active = problem.leaves[0], problem.case.width, problem.case.expert_width * problem.case.k
    up, down = problem.matrix(2 * active, width), problem.matrix(width, active)

    def run() -> Tensor:
        gate, value = functional.linear(x_TD, up).chunk(2, -1)
        return functional.linear(functional.silu(gate) * value, down)

    return Contender(run, [x_TD, up, down])


def ours(problem: Problem, backend: str) -> Contender:
    """One of our backends, if it can run."""
    _check(problem, backend)
    return crossways_contender(problem, backend)


def _check(problem: Problem, backend: str) -> None:
    if reason := why_not(backend, torch.device(problem.device), problem.dtype):
        raise AbsentError(reason)
    sizes = (problem.case.width, problem.case.expert_width)
    if backend.endswith("grouped_mm") and any(size * problem.dtype.itemsize % 16 for size in sizes):
        raise AbsentError("torch.nn.functional.grouped_mm needs rows of a multiple of 16 bytes")


def of_transformers(problem: Problem, name: str) -> Contender:
    """One of transformers' implementations, or the plain loop of its models (`eager`), in OLMoE's experts."""
    short = name.removeprefix(PREFIX)
    if short != "eager":
        _check(problem, name)
    x_TD, weight_TK, up_EHD, _ = problem.leaves
    copied = weight_TK.numel() * up_EHD[0].numel() * problem.dtype.itemsize
    if short == "batched_mm" and copied > BATCHED_LIMIT:
        raise AbsentError(f"it would copy more than {BATCHED_LIMIT / 2**20:.0f} MiB of matrices")
    module = _olmoe_experts(problem)
    run = OlmoeExperts.forward.__wrapped__ if short == "eager" else ALL_EXPERTS_FUNCTIONS[short]
    filled = problem.case.experts**2 * problem.case.expert_bytes(problem.dtype.itemsize)
    dear = short == "eager" and filled > EAGER_LIMIT
    why = f"its gradients of slices fill more than {EAGER_LIMIT / 2**30:.0f} GiB" if dear else ""
    return Contender(lambda: run(module, x_TD, problem.index_TK, weight_TK), problem.leaves, forward_only=why)


def _olmoe_experts(problem: Problem) -> OlmoeExperts:
    case = problem.case
    config = OlmoeConfig(hidden_size=case.width, intermediate_size=case.expert_width, num_experts=case.experts)
    with torch.device("meta"):
        module = OlmoeExperts(config)
    # Not parameters: the very tensors of the other contenders, so that gradients land in the same place.
    del module.gate_up_proj, module.down_proj
    module.gate_up_proj, module.down_proj = problem.leaves[2:]
    return module


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a package does when its CUDA parts are missing
        raise AbsentError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else name}") from error


def scatter_moe(problem: Problem) -> Contender:
    """ScatterMoE (Tan et al. 2024, arXiv 2403.08245): its `GLUMLP`, which has the gate in the second half."""
    mlp = _import("scattermoe.mlp")
    x_TD, weight_TK, up_EHD, down_EDF = problem.leaves
    case = problem.case
    module = mlp.GLUMLP(case.width, case.expert_width, case.experts, case.k, activation=nn.SiLU()).to(x_TD)
    with torch.no_grad():
        module.experts.weight.copy_(up_EHD.roll(case.expert_width, dims=1))
        module.output_experts.weight.copy_(down_EDF)
    leaves = [x_TD, weight_TK, module.experts.weight, module.output_experts.weight]
    return Contender(lambda: module(x_TD, weight_TK, problem.index_TK), leaves, shared=2)


def mega_blocks(problem: Problem) -> Contender:
    """MegaBlocks (Gale et al. 2022, arXiv 2211.15841): its dropless experts over grouped products, no router.

    Its rows of both matrices are (E F, D), the second one transposed.
    """
    layers, arguments = _import("megablocks.layers.dmoe"), _import("megablocks.layers.arguments")
    x_TD, weight_TK, up_EHD, down_EDF = problem.leaves
    case = problem.case
    if problem.dtype != torch.bfloat16:
        raise AbsentError(f"its grouped products take bfloat16, not {problem.dtype}")
    module = layers.ParallelDroplessMLP(
        arguments.Arguments(
            hidden_size=case.width, ffn_hidden_size=case.expert_width, moe_num_experts=case.experts,
            moe_top_k=case.k, activation_fn=functional.silu, mlp_type="glu", mlp_impl="grouped", bias=False,
            return_bias=False, fp16=False, bf16=True, device=x_TD.device,
        )
    )  # fmt: skip
    gate, value = up_EHD.detach().chunk(2, 1)
    with torch.no_grad():
        for parameter, matrix in zip(
            (module.mlp.w1, module.mlp.v1, module.mlp.w2), (gate, value, down_EDF.mT), strict=True
        ):
            parameter.copy_(matrix.reshape(parameter.shape))
    leaves = [x_TD, weight_TK, module.mlp.w1, module.mlp.v1, module.mlp.w2]
    return Contender(lambda: module.forward_once(x_TD, weight_TK, problem.index_TK)[0], leaves, shared=2)


def sonic_moe(problem: Problem) -> Contender:
    """SonicMoE (Guo et al. 2025, arXiv 2512.14080): its ragged entry point; gate and value rows alternate."""
    functions, enums = _import("sonicmoe.functional"), _import("sonicmoe.enums")
    x_TD, weight_TK, up_EHD, down_EDF = problem.leaves
    case = problem.case
    up = up_EHD.detach().unflatten(1, (2, case.expert_width)).transpose(1, 2).flatten(1, 2).requires_grad_()
    down = down_EDF.detach().clone().requires_grad_()
    token_P = torch.arange(case.tokens, device=x_TD.device, dtype=torch.int32).repeat_interleave(case.k)
    run = functions.moe_general_routing_inputs
    known = inspect.signature(run).parameters
    # Newer versions know the stream by themselves.
    stream = {"stream_id": torch.cuda.current_stream().cuda_stream} if "stream_id" in known else {}

    def forward() -> Tensor:
        return run(
            x_TD, weight_TK.flatten(), token_P, problem.index_TK.flatten().int(),
            up.permute(1, 2, 0), None, down.permute(1, 2, 0), None, E=case.experts,
            activation_type=enums.ActivationType.SWIGLU, is_inference_mode_enabled=not torch.is_grad_enabled(),
            **stream,
        )[0]  # fmt: skip

    return Contender(forward, [x_TD, weight_TK, up, down], shared=2)


_PACKAGES: dict[str, Callable[[Problem], Contender]] = {
    "scattermoe": scatter_moe,
    "megablocks": mega_blocks,
    "sonicmoe": sonic_moe,
}


def make(problem: Problem, name: str) -> Contender:
    """The contender of this name; raises `AbsentError` where it cannot take part."""
    if name == DENSE:
        return dense(problem)
    if name in _PACKAGES:
        return _PACKAGES[name](problem)
    return of_transformers(problem, name) if name.startswith(PREFIX) else ours(problem, name)
