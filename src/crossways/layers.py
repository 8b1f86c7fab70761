"""The routed layers that take the place of a feed-forward network: `MoE` and `CartesianMoE`.

Legend: B batch, S sequence, D model width, F feed-forward width, E experts, A factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.experts.module import Experts
from crossways.experts.negated import signed
from crossways.experts.weighted_inputs import on_weighted_inputs
from crossways.experts.zero_computation import ZeroComputationExperts
from crossways.router import Router
from crossways.routing import Context, Routing

WeightsOn = Literal["output", "input"]


class FeedForward(nn.Module):
    """A dense feed-forward network, used as the shared expert: down(activation(up(x))), no bias."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "swiglu") -> None:
        super().__init__()
        self.activation = Activation(activation)
        rows = intermediate_size * (2 if self.activation.gated else 1)
        self.up_proj = nn.Linear(hidden_size, rows, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        return self.down_proj(self.activation(self.up_proj(x_BSD)))


class SharedExpert(FeedForward):
    """The feed-forward network that every token passes through, times a fixed `scale`, times sigmoid(w x) with a
    learnt w where it is gated (Qwen2-MoE; `moe_shared_expert_gate` of Megatron-core)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "swiglu",
        scale: float = 1.0,
        gated: bool = False,
    ) -> None:
        """
        Args:
            hidden_size: D.
            intermediate_size: F.
            activation: as for experts.
            scale: factor on the output; 1 is the customary form.
            gated: whether to learn w, (1, D) without bias.
        """
        super().__init__(hidden_size, intermediate_size, activation)
        self.scale = scale
        self.gate = nn.Linear(hidden_size, 1, bias=False) if gated else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        y_BSD = super().forward(x_BSD)
        y_BSD = y_BSD if self.gate is None else y_BSD * self.gate(x_BSD).sigmoid()
        return y_BSD if self.scale == 1.0 else y_BSD * self.scale


class Latent(nn.Module):
    """One projection into the smaller space that routed experts read and write, and one back (`moe_latent_size` of
    Megatron-core): their matrices shrink by the same factor, for two matrices that every token multiplies by."""

    def __init__(self, hidden_size: int, latent_size: int) -> None:
        """
        Args:
            hidden_size: D.
            latent_size: width of the smaller space.
        """
        super().__init__()
        self.down_proj = nn.Linear(hidden_size, latent_size, bias=False)
        self.up_proj = nn.Linear(latent_size, hidden_size, bias=False)


class MoE(nn.Module):
    """y = sum over chosen experts of weight_e FFN_e(x), plus FFN_shared(x) where there is a shared expert.

    The shared expert (DeepSeekMoE, arXiv 2401.06066, section 3.2; SMoE-Share of CartesianMoE, arXiv 2410.16077) is
    not routed and not weighted, and may have any width. Zero-computation experts (MoE++, arXiv 2410.07348) come
    after the feed-forward experts in the router's numbering, and between them the slots that subtract the
    feed-forward experts, if there are any (TC-MoE).

    With a latent space FFN_e is up(E_e(down(x))), where down and up belong to the layer: router, shared expert and
    zero-computation experts keep the full width. With weights on the `input` it is FFN_e(weight_e x) that is summed.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared_expert: nn.Module | None = None,
        zero_computation: ZeroComputationExperts | None = None,
        negated: bool = False,
        latent: Latent | None = None,
        weights_on: WeightsOn = "output",
    ) -> None:
        """
        Args:
            router: decides among all experts.
            experts: the feed-forward experts, first in the router's numbering.
            shared_expert: (B, S, D) to (B, S, D), or None.
            zero_computation: the experts after them, or None.
            negated: whether each feed-forward expert has a second slot, in which it is subtracted.
            latent: to and from the space of `experts`, or None where that is the layer's.
            weights_on: what routing weights multiply, each expert's `output` or its `input`.
        """
        super().__init__()
        self.router, self.experts, self.shared_expert = router, experts, shared_expert
        self.zero_computation, self.negated = zero_computation, negated
        self.latent, self.weights_on = latent, weights_on

    @property
    def routers(self) -> tuple[Router, ...]:
        """The layer's routers in the order of its routings."""
        return (self.router,)

    def forward(
        self,
        x_BSD: Tensor,
        residual_BSD: Tensor | None = None,
        contexts: Sequence[Context] = (Context(),),
        router_input_BSD: Tensor | None = None,
        routers: Sequence[Router] | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """
        Args:
            x_BSD: the normalised input (B, S, D).
            residual_BSD: unused; a plain layer depends on its input alone.
            contexts: what each router may look at beside its input, one per router.
            router_input_BSD: what the router reads, by default `x_BSD`.
            routers: who decides, by default `self.routers`; one per router.

        Returns:
            What to add to the residual stream (B, S, D), and the routing of each router.
        """
        (router,) = routers or self.routers
        routing = router(x_BSD if router_input_BSD is None else router_input_BSD, contexts[0])
        y_BSD = self._routed(x_BSD.flatten(0, 1), routing.assignment).view_as(x_BSD)
        if self.shared_expert is not None:
            y_BSD = y_BSD + self.shared_expert(x_BSD)
        return y_BSD, (routing,)

    def _routed(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        if self.zero_computation is None:
            return self._feed_forward(x_TD, assignment)
        first = assignment.num_experts - self.zero_computation.num_experts
        rest = assignment.of_experts(first, assignment.num_experts)
        y_TD = self._feed_forward(x_TD, assignment.of_experts(0, first))
        return y_TD + self._weighed(self.zero_computation, x_TD, rest)

    def _feed_forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        assignment = signed(assignment) if self.negated else assignment
        if self.latent is None:
            return self._weighed(self.experts, x_TD, assignment)
        return self.latent.up_proj(self._weighed(self.experts, self.latent.down_proj(x_TD), assignment))

    def _weighed(self, experts: nn.Module, x_TD: Tensor, assignment: Assignment) -> Tensor:
        return (
            on_weighted_inputs(experts, x_TD, assignment) if self.weights_on == "input" else experts(x_TD, assignment)
        )


Skip = Literal["factor", "input"]
RouterInput = Literal["factor", "layer"]


class CartesianMoE(nn.Module):
    """Routed sub-layers in sequence, so that an expert is a tuple of sub-experts (CartesianMoE, arXiv 2410.16077,
    figure 1c): h_1 = r + MoE_1(Norm_1(r)), h_2 = h_1 + MoE_2(Norm_2(h_1)), and so on, each with its own router that
    reads what the previous factor wrote.

    The paper draws neither norms nor the last skip; pre-norm is our reading (LLaMA's), and `skip` selects where the
    last residual starts: `factor` adds to the previous factor's output, `input` to the layer's input. Norm_1 belongs
    to the caller, as for any feed-forward network, so one factor alone is exactly `MoE`.

    With `router_input = layer` every router reads Norm_1(r), so that a factor's choice cannot depend on what the one
    before computed: the control that tells the composition of choices from the mere depth. Experts still run in
    sequence.
    """

    def __init__(
        self,
        factors: Sequence[MoE],
        norms: Sequence[nn.Module],
        skip: Skip = "factor",
        router_input: RouterInput = "factor",
    ) -> None:
        """
        Args:
            factors: A >= 1 routed sub-layers.
            norms: the A - 1 norms between them.
            skip: see above.
            router_input: see above.
        """
        super().__init__()
        if len(norms) != len(factors) - 1:
            raise ValueError(f"{len(factors)} factors need {len(factors) - 1} norms between them, got {len(norms)}")
        self.factors, self.norms = nn.ModuleList(factors), nn.ModuleList(norms)
        self.skip, self.router_input = skip, router_input

    @property
    def routers(self) -> tuple[Router, ...]:
        """The layer's routers, one per factor, in order."""
        return tuple(factor.router for factor in self.factors)  # type: ignore[misc]

    def forward(
        self,
        x_BSD: Tensor,
        residual_BSD: Tensor,
        contexts: Sequence[Context] | None = None,
        routers: Sequence[Router] | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """As `MoE.forward`, with the residual stream (B, S, D) that `x_BSD` is the norm of."""
        contexts, routers = contexts or (Context(),) * len(self.factors), routers or self.routers
        added_BSD, routings = self.factors[0](x_BSD, contexts=contexts[:1], routers=routers[:1])
        router_input_BSD = x_BSD if self.router_input == "layer" else None
        rest = zip(self.norms, self.factors[1:], contexts[1:], routers[1:], strict=True)
        for norm, factor, context, router in rest:
            x_BSD = norm(residual_BSD + added_BSD)
            y_BSD, routing = factor(x_BSD, None, (context,), router_input_BSD, (router,))
            last_alone = self.skip == "input" and factor is self.factors[-1]
            added_BSD = y_BSD if last_alone else added_BSD + y_BSD
            routings = (*routings, *routing)
        return added_BSD, routings
