"""`crossways upcycle`: a dense model becomes a routed one, saved with its tokenizer and with how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from crossways.errors import UserError

SAMPLE = """def greet(name: str) -> str:
    \"\"\"A line of text and a little code, on which the two models are compared.\"\"\"
    return f"The quick brown fox jumps over {name}, who lies in the sun and does not mind at all."
"""


def upcycle_command(
    model: Annotated[
        str, typer.Argument(help="Dense model: a folder, a hub's name, a GGUF file, or package:NAME (a GGUF inside).")
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the routed model and the tokenizer.")],
    gguf: Annotated[str | None, typer.Option(help="Name of a GGUF file in MODEL.")] = None,
    experts: Annotated[int, typer.Option(min=1, help="Routed experts; short for --set num_experts=...")] = 8,
    k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Experts per token, by top-k; default --granularity, which is one copy, or 2 copies."
        ),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Every n-th layer is routed; short for --set moe_every=...")] = 1,
    granularity: Annotated[
        int, typer.Option(min=1, help="Shards of the feed-forward network: 1 copies it, --experts splits it.")
    ] = 1,
    neurons: Annotated[str, typer.Option(help="What makes a shard: kmeans, random or contiguous.")] = "kmeans",
    carrier: Annotated[str, typer.Option(help="What carries the dense function: experts or shared.")] = "experts",
    gate_start: Annotated[str, typer.Option(help="auto, random, groups or centres.")] = "auto",
    noise: Annotated[float, typer.Option(min=0, help="Noise on the experts, relative.")] = 0.0,
    redraw: Annotated[float, typer.Option(min=0, max=1, help="Share of each expert's neurons drawn anew.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of gates, clustering, noise.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any routing field of the model, e.g. layer=cartesian."),
    ] = None,
) -> None:
    """Make a mixture of experts of a dense model, and say whether it is still the same function.

    Writes OUT with the tokenizer and upcycle.json: source, settings, and what was measured.
    """
    from crossways.commands.terminal import no_bars_in_logs
    from crossways.study.load import validated
    from crossways.surgery.sources import load_pretrained
    from crossways.surgery.upcycle import UpcycleSettings, upcycle

    no_bars_in_logs()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")
    settings = validated(
        UpcycleSettings,
        {
            "granularity": granularity,
            "neurons": neurons,
            "carrier": carrier,
            "gate_start": gate_start,
            "noise": noise,
            "redraw": redraw,
            "seed": seed,
        },
        "crossways upcycle",
    )
    routing = _routing(experts, k or (granularity if granularity > 1 else min(2, experts)), every, overrides or [])
    dense, tokenizer = load_pretrained(model, gguf)
    upcycled = upcycle(dense.eval(), routing, settings)
    measured = _compare(dense, upcycled.model, tokenizer)
    upcycled.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "source": model,
        "gguf": gguf,
        "routing": routing,
        "settings": settings.model_dump(),
        "same_function": not upcycled.differences,
        "differences": list(upcycled.differences),
        **measured,
    }
    (out / "upcycle.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _say(record, dense, upcycled.model, out)


def _routing(experts: int, k: int, every: int, overrides: list[str]) -> dict[str, Any]:
    """The routing fields asked for, an explicit --set last."""
    from crossways.study.load import apply_overrides, validated
    from crossways.study.partial import ModelFields

    raw = {"num_experts": experts, "moe_every": every, "select": {"name": "top_k", "k": k}}
    fields = validated(ModelFields, apply_overrides(raw, overrides), "crossways upcycle")
    return fields.model_dump(exclude_unset=True)


def _compare(dense: Any, routed: Any, tokenizer: Any) -> dict[str, float]:
    """Logits of both models on a few lines: the greatest difference, and the spread it is to be held against."""
    import torch

    ids_BS = torch.tensor([tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]], device=dense.device)
    with torch.no_grad():
        before_BSV, after_BSV = (model(ids_BS).logits.float() for model in (dense, routed.eval()))
    return {
        "greatest_logit_difference": float((after_BSV - before_BSV).abs().max()),
        "logit_deviation": float(before_BSV.std()),
    }


def _say(record: dict[str, Any], dense: Any, routed: Any, out: Path) -> None:
    def size(model: Any) -> str:
        return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters"

    typer.echo(f"dense: {type(dense).__name__}, {size(dense)}; routed: {size(routed)}")
    verdict = "by construction" if record["same_function"] else "no, " + "; ".join(record["differences"])
    typer.echo(f"the same function: {verdict}")
    typer.echo(
        f"greatest difference in logits on a sample: {record['greatest_logit_difference']:.3g} "
        f"(logits deviate by {record['logit_deviation']:.3g})"
    )
    typer.echo(f"model: {out}")
