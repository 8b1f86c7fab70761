"""`crossways routers`: the routing methods that can be selected, and an explanation of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console


def routers_command(
    name: Annotated[str | None, typer.Argument(help="Explain this one; by default all are listed.")] = None,
) -> None:
    """List the published routing methods, or explain one: paper, equation, properties and the recipe lines for it."""
    from rich.console import Console

    console = Console()
    if name is None:
        _list(console)
    else:
        _explain(name, console)


def _list(console: Console) -> None:
    from rich.text import Text

    from crossways.methods import method_config, method_properties, methods, recipe_lines

    for name, method in methods().items():
        properties = method_properties(method_config(method))
        flags = [
            text if holds else f"not {text}"
            for text, holds in (
                ("causal", properties.causal),
                ("batch-invariant", properties.batch_invariant),
                ("exact budget", properties.exact_budget),
            )
        ]
        if properties.decode_twin:
            flags.append(f"generates by {properties.decode_twin}")
        console.print(Text(name, style="bold"), Text(method.title, style="italic"), sep="  ")
        console.print(Text(f"  {method.paper}: {method.equation}"), soft_wrap=True)
        console.print(Text(f"  {', '.join(flags)}"), soft_wrap=True)
        indented = "\n".join(f"    {line}" for line in recipe_lines(method).splitlines())
        console.print(Text(indented, style="dim"), soft_wrap=True)


def _explain(name: str, console: Console) -> None:
    from rich.text import Text

    from crossways.methods import find_method, method_config, method_parts, method_properties, recipe_lines

    method = find_method(name)
    config = method_config(method)
    properties = method_properties(config)
    console.print(Text(method.title, style="bold"))
    console.print(Text(f"{method.paper}: {method.equation}"), soft_wrap=True)
    if method.note:
        console.print(Text(f"\n{method.note}"), soft_wrap=True)
    console.print(Text(f"\n{recipe_lines(method)}\n"), soft_wrap=True)
    for text, holds in (
        ("causal: a later token never changes an earlier token's experts", properties.causal),
        ("batch-invariant: another row of the batch never changes mine", properties.batch_invariant),
        ("exact budget: the number of executed experts does not depend on the text", properties.exact_budget),
    ):
        console.print(Text(f"{'yes' if holds else 'no ':3} {text}"), soft_wrap=True)
    console.print(Text(f"generates by {properties.decode_twin or 'the same rule'}"), soft_wrap=True)
    for part, (line, documentation) in method_parts(config).items():
        console.print(Text(f"\n{part}: {line}", style="bold"), soft_wrap=True)
        console.print(Text("\n".join(f"  {row}".rstrip() for row in documentation.splitlines())), soft_wrap=True)
