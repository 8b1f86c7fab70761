"""What rerouting costs and saves in wall time: random models of transformers, as they are and rerouted, in one run.

    python benchmarks/reroute.py [--model olmoe qwen2-moe] [--dtype float32 bfloat16] [--seconds 6]

Contenders share the weights and run in turn. A cell holds the time of the rerouted model over the time of the
original in the same round, median and half the interquartile range: over the original as it is loaded (transformers'
`grouped_mm`), and over the original with our expert compute, which alone says what routing anew costs and what fewer
pairs save. Scoring is a full pass; generation feeds given tokens one at a time into a cache. Before anything is
timed, the outputs of every rerouted model are compared with those of the family's own experts, one row for each pair.

Legend: B rows, S tokens of a row.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, OlmoeConfig, OlmoeForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import crossways
from crossways.calibrate import calibrate
from crossways.surgery.handle import handle_of
from measure import in_turn, ratio
from table import line

VOCABULARY, LAYERS, PROMPT, STEPS = 2048, 4, 16, 16
BUDGETS = (1.0, 0.85, 0.7, 0.5)
"""Shares of the own number of experts per token."""
RULES = ("token-choice", "threshold", "usmoe")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
SCORING, GENERATION = ((4, 128), (4, 512)), (1, 4)


def olmoe() -> Any:
    """512 wide, 64 experts of 256, 8 of them for a token."""
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=256,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_experts=64,
            num_experts_per_tok=8,
            eos_token_id=1,
        )
    )


def qwen2_moe() -> Any:
    """576 wide, 16 experts of 48, 12 of them for a token, and a shared one of 768: SmolLM2, split."""
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=576,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=768,
            num_hidden_layers=LAYERS,
            num_attention_heads=9,
            num_key_value_heads=3,
            num_experts=16,
            num_experts_per_tok=12,
            norm_topk_prob=True,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {"olmoe": olmoe, "qwen2-moe": qwen2_moe}


@dataclass
class Task:
    """Something to time, on the same tokens for every contender."""

    name: str
    ids_BS: Tensor
    decoding: bool

    @torch.inference_mode()
    def run(self, model: Any) -> Tensor:
        """Logits, of the last position."""
        if not self.decoding:
            return model(input_ids=self.ids_BS, use_cache=False).logits[:, -1]
        cache = DynamicCache(config=model.config)
        said = model(input_ids=self.ids_BS[:, :PROMPT], past_key_values=cache)
        for step in range(PROMPT, self.ids_BS.shape[1]):
            said = model(input_ids=self.ids_BS[:, step : step + 1], past_key_values=cache)
        return said.logits[:, -1]

    def executed(self, model: Any) -> float:
        """Mean experts per token and layer, of the tokens that this task is about."""
        pairs, tokens = 0, 0

        def count(*_: object) -> None:
            nonlocal pairs, tokens
            handle = handle_of(model)
            loads = [] if handle is None else handle.loads()
            pairs += sum(int(load_E.sum()) for load_E in loads)
            tokens += len(loads) * self.ids_BS.shape[0] * (1 if self.decoding else self.ids_BS.shape[1])

        def after_prompt(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not self.decoding or kwargs["input_ids"].shape[1] == 1:
                count()

        hook = model.register_forward_hook(after_prompt, with_kwargs=True)
        self.run(model)
        hook.remove()
        return pairs / max(tokens, 1)


def sharing(model: Any) -> Any:
    """A copy of everything but the weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def rerouted(model: Any, rule: str, k: float, experts: str | None, batch: dict[str, Tensor]) -> Any:
    """A copy under a rule, calibrated where its twin needs that."""
    twin = sharing(model)
    handle = crossways.reroute(twin, rule, k=int(k) if rule == "token-choice" else k, experts=experts)  # type: ignore[arg-type]
    if any(router.has_cutoff for router in handle.routers.values()):
        calibrate(twin, [batch], passes=0, check=[batch])
    return twin


def check(task: Task, ours: Any, reference: Any, tolerance: float) -> None:
    """Raises RuntimeError when the two differ by more than `tolerance` in relative RMS."""
    actual, expected = task.run(ours).float(), task.run(reference).float()
    error = ((actual - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        raise RuntimeError(f"{task.name}: differs from the family's own experts by {error:.1e}; not timed")


def tasks(generator: torch.Generator) -> list[Task]:
    """All of them."""

    def ids(rows: int, length: int) -> Tensor:
        return torch.randint(VOCABULARY, (rows, length), generator=generator)

    scoring = [Task(f"scoring, {rows} x {length}", ids(rows, length), decoding=False) for rows, length in SCORING]
    return scoring + [
        Task(f"generation, {rows} at a time", ids(rows, PROMPT + STEPS), decoding=True) for rows in GENERATION
    ]


def compare(name: str, dtype: torch.dtype, seconds: float) -> None:
    """The lines of one model."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval().requires_grad_(False)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.1)
    k = model.config.num_experts_per_tok
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(VOCABULARY, (4, 256), generator=generator)
    batch = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": ids_BS}
    with_ours = sharing(model)
    with_ours.set_experts_implementation("crossways")
    settings = [(rule, share) for rule in RULES for share in BUDGETS if rule != "token-choice" or share < 1]
    made = {
        (rule, share): [rerouted(model, rule, round(k * share, 2), experts, batch) for experts in (None, "own")]
        for rule, share in settings
    }
    for task in tasks(generator):
        for ours, reference in made.values():
            check(task, ours, reference, TOLERANCE[dtype])
        contenders = {"original": model, "with ours": with_ours}
        contenders |= {f"{rule} {share}": ours for (rule, share), (ours, _) in made.items()}
        times = in_turn({label: partial(task.run, one) for label, one in contenders.items()}, seconds)
        milliseconds = 1e3 * statistics.median(times["original"])
        line([name, task.name, "original", k, f"{milliseconds:.1f} ms", ratio(times["original"], times["with ours"])])
        for (rule, share), (ours, _) in made.items():
            spent = times[f"{rule} {share}"]
            cells = [ratio(spent, times["original"]), ratio(spent, times["with ours"])]
            line([name, task.name, rule, f"{task.executed(ours):.1f}", *cells])


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each model, dtype and task, about")
    arguments = parser.parse_args()
    crossways.register_experts()
    columns = ["model", "task", "rule", "experts per token", "time / original", "time / original with our experts"]
    for dtype in arguments.dtype:
        print(f"\n{dtype}, {torch.get_num_threads()} threads\n")
        line(columns)
        line(["---"] * len(columns))
        for name in arguments.model:
            compare(name, getattr(torch, dtype), arguments.seconds)


if __name__ == "__main__":
    main()
