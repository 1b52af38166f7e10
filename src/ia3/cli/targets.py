"""`ia3 targets`: what of a model would be adapted, without loading its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from ia3.cli.flags import AsJson, TrustRemoteCode, print_json
from ia3.cli.names import module_names
from ia3.runs.screen import Screen

if TYPE_CHECKING:
    from ia3.config import IA3Config
    from ia3.sites import Site


def targets(
    model: Annotated[str, typer.Argument(help="The base model: a hub name, a folder or a bundled model.")],
    target_modules: Annotated[
        str | None, typer.Option(help="The modules to adapt: names with commas between, a pattern, or all-linear.")
    ] = None,
    feedforward_modules: Annotated[
        str | None, typer.Option(help="Those of them whose input is multiplied, not the output.")
    ] = None,
    exclude_modules: Annotated[str | None, typer.Option(help="Modules to leave alone.")] = None,
    towers: Annotated[
        str | None, typer.Option(help="Sub-models that the family's modules are for, such as decoder, with commas.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare with what one forward of a tiny twin does; exit code 1 if it differs."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show which modules of a model get a vector, as a tree; needs the model's configuration alone."""
    with Screen(stderr=True).status(f"Looking at {model}"):
        from ia3.config import IA3Config
        from ia3.sites import find_sites

        config = IA3Config(
            target_modules=module_names(target_modules),
            feedforward_modules=module_names(feedforward_modules),
            exclude_modules=module_names(exclude_modules),
            towers=module_names(towers),
        )
        base = _without_weights(model, trust_remote_code)
        found = find_sites(base, config)
        checked = _check(base.config, config) if check else None
    total = sum(parameter.numel() for parameter in base.parameters())
    size, adapted, multiplied = found.layout.size, found.config.target_modules, found.config.feedforward_modules
    if as_json:
        print_json(
            {
                "model": model,
                "target_modules": _names(adapted),
                "feedforward_modules": _names(multiplied),
                "note": found.note,
                "sites": [
                    {"path": site.path, "side": site.side, "shape": site.shape, "trained": site.trained_width}
                    for site in found.layout.sites
                ],
                "trained_numbers": size,
                "base_parameters": total,
                **({} if checked is None else {"check": checked}),
            }
        )
    else:
        _show(model, base, found, total, checked)
    if checked is not None and checked["differences"]:
        raise typer.Exit(1)


def _show(model: str, base: Any, found: Any, total: int, checked: dict[str, Any] | None) -> None:
    """The tree, the totals, and what a check said."""
    size = found.layout.size
    tree = Tree(Text(f"{model} ({type(base).__name__})"))
    _grow(tree, _nested(found.layout.sites))
    lines = [
        f"{len(found.layout.sites):,} vectors, {size:,} trained numbers, {size / total:.3%} of the base's {total:,}",
        f"target modules: {_spell(found.config.target_modules)}",
        f"whose input is multiplied: {_spell(found.config.feedforward_modules)}",
        *([found.note] if found.note else []),
        *([] if checked is None else _said(checked)),
    ]
    console = Screen()
    console.print(tree)
    console.print("", *lines, sep="\n", markup=False, highlight=False)


def _check(configuration: Any, config: IA3Config) -> dict[str, Any]:
    """What one forward of a tiny model of this configuration says of the sites that the same targets give it."""
    from ia3.dataflow import compare, observe
    from ia3.errors import NoMatchingPeftModuleError
    from ia3.sites import find_sites
    from ia3.twin import tiny_twin

    twin, batch = tiny_twin(configuration)
    flow = observe(twin, batch)
    try:
        sites = find_sites(twin, config).layout.sites
    except NoMatchingPeftModuleError as error:
        raise ValueError(
            f"--check looks at a tiny {type(twin).__name__} of few layers, where not all of these modules exist. "
            f"Name them without their layers' numbers. {error}"
        ) from error
    return {
        "class": type(twin).__name__,
        "inputs": sorted(batch),
        "attentions": len(flow.attentions),
        "feedforwards": len(flow.feedforwards),
        "differences": compare(flow, sites),
    }


def _said(checked: dict[str, Any]) -> list[str]:
    differences = checked["differences"]
    of = f"a tiny {checked['class']}, given {', '.join(checked['inputs'])}"
    parts = f"{_counted(checked['attentions'], 'attention')} and {_counted(checked['feedforwards'], 'feed-forward')}"
    seen = f"{parts} of {of}"
    if not differences:
        return [
            f"checked by one forward of a tiny twin: one vector on keys, values and intermediate, and no other ({seen})"
        ]
    return [f"one forward of a tiny twin says otherwise ({seen}):", *(f"  {sentence}" for sentence in differences)]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _without_weights(model_name: str, trusted: bool) -> Any:
    """The model on the meta device, of the class that its configuration names."""
    import torch
    import transformers

    from ia3.inference.loading import Base
    from ia3.pretrained import make_model

    config = Base(model_name, trust_remote_code=trusted).config
    named = config.architectures
    kind: Any = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        kind = transformers.AutoModel
    with torch.device("meta"):
        return make_model(kind, config, trust_remote_code=trusted)


def _names(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list) else value


def _nested(sites: Iterable[Site]) -> dict[str, Any]:
    """The modules on the way to sites, by name; what a site is stands in its module under the empty name."""
    root: dict[str, Any] = {}
    for site in sites:
        node = root
        for part in site.path.split("."):
            node = node.setdefault(part, {})
        trained = "" if site.intervals is None else f"{site.trained_width:,} of "
        node[""] = f"{site.side}  {trained}{site.width:,}"
    return root


def _runs(node: dict[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """A module's children in order; numbered neighbours that look alike are one."""
    runs: list[tuple[list[str], dict[str, Any]]] = []
    for name, child in node.items():
        if name.isdigit() and runs and runs[-1][0][-1].isdigit() and runs[-1][1] == child:
            runs[-1][0].append(name)
        elif name:
            runs.append(([name], child))
    return runs


def _grow(tree: Tree, node: dict[str, Any]) -> None:
    for names, child in _runs(node):
        name = names[0] if len(names) == 1 else f"{names[0]}–{names[-1]}"
        while "" not in child and len(child) == 1:  # a chain without a fork is one line
            ((part, child),) = child.items()
            name = f"{name}.{part}"
        text = Text(name, style="bold" if "" in child else "")
        if len(names) > 1:
            text.append(f"  {len(names)} alike", style="cyan")
        if "" in child:
            text.append(f"  {child['']}", style="not bold green")
        _grow(tree.add(text), child)


def _spell(value: Any) -> str:
    return ", ".join(_names(value)) if isinstance(value, set | list) else str(value)
