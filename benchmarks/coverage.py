"""Which model types of transformers `IA3Config()` alone adapts as the paper says, each by one forward of a tiny twin.

    python benchmarks/coverage.py                 # every type that benchmarks/results/coverage.jsonl lacks
    python benchmarks/coverage.py --shard 1/4     # a quarter of them
    python benchmarks/coverage.py llama whisper   # these, anew
    python benchmarks/coverage.py --again         # all that aren't as the paper says, anew
    python benchmarks/coverage.py --table         # nothing anew: the table, and docs/models.md

A type is built tiny from its default configuration, run once with what reaches keys, values and intermediates recorded,
and compared with the sites that are found; then the adapted model must equal its base at the start, give every vector a
gradient, come back from a file into a fresh base with the same outputs, and be merged with the same outputs. Each type
is a process of its own with a limit of time.

Needs: CPU; nothing more; about 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers import logging as transformers_logging

import ia3
from bench import machine, say_machine
from ia3.dataflow import Flow, compare, observe
from ia3.sites import Site, find_sites
from ia3.twin import NoTwinError, tiny_twin

RESULTS = Path(__file__).parent / "results" / "coverage.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GLM = {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
_ROPE_BY_LAYER = {"full_attention": _ROPE, "sliding_attention": _ROPE}

# What a type's default configuration leaves out although its own model reads it.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "time_series_transformer": {"prediction_length": 4},
    **{
        kind: {"text_config": {"rope_parameters": _GLM}}
        for kind in ("glm4v", "glm46v", "glm4v_moe", "glmga", "glm_image")
    },
    **{kind: {"rope_parameters": _GLM} for kind in ("glm4v_text", "glm4v_moe_text", "glm_image_text")},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": _ROPE_BY_LAYER},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
}

OUTCOMES = {
    "true": "as the paper says",
    "differs": "adapted otherwise",
    "fails": "as the paper says, and fails a check",
    "refused": "refused",
    "no attention": "without softmax attention",
    "no twin": "not built tiny",
}


# One type


def look(kind: str) -> dict[str, Any]:
    """Everything that is told of one type."""
    try:
        model, batch = tiny_twin(CONFIG_MAPPING[kind](**LEFT_OUT.get(kind, {})))
    except NoTwinError as error:
        return {"outcome": "no twin", "reason": _short(error)}
    except Exception as error:  # the default configuration itself
        return {"outcome": "no twin", "reason": f"its default configuration: {_short(error)}"}
    untouched = deepcopy(model)  # some models keep what a forward made
    flow = observe(model, batch)
    told: dict[str, Any] = {
        "class": type(model).__name__,
        "inputs": sorted(batch),
        "attentions": len(flow.attentions),
        "feedforwards": len(flow.feedforwards),
        "skipped": _without_numbers(flow.skipped.values()),
        "flow": _flow_in_words(flow),
    }
    attends = bool(flow.attentions or flow.skipped)
    try:
        sites = find_sites(model, ia3.IA3Config()).layout.sites
    except Exception as error:
        return {**told, "outcome": "refused" if attends else "no attention", "reason": _short(error)}
    told["sites"] = in_words(sites)
    if not attends:
        return {**told, "outcome": "differs", "reason": "adapted, and has no softmax attention"}
    differences = compare(flow, sites)
    if differences:
        return {**told, "outcome": "differs", "differences": _without_numbers(differences)}
    failed = list(checks(untouched, batch, flow))
    return {**told, "outcome": "fails" if failed else "true", "failed": failed}


def checks(model: nn.Module, batch: dict[str, Any], flow: Flow) -> Iterator[str]:
    """What doesn't hold of the adapted model, a sentence each, of what the batch reaches."""
    base, fresh = deepcopy(model), deepcopy(model)
    expected = outputs(base, batch)
    adapted: Any = ia3.get_peft_model(model, ia3.IA3Config())
    adapted.eval()
    # Times one is the same number, and may lie in memory otherwise, where a product rounds otherwise.
    if not _close(outputs(adapted, batch), expected, 1e-6):
        yield "the adapted model isn't its base at the start"
    vectors = {name: value for name, value in adapted.named_parameters() if ".ia3_l." in f".{name}"}
    with torch.no_grad():
        for vector in vectors.values():
            vector.add_(torch.randn_like(vector), alpha=0.1)
    read = {name.rpartition(".")[0] for name in flow.bare}  # by a function, past the module that holds it
    without = [path for path in _without_gradient(adapted, batch, vectors) if path in flow.ran or path in read]
    if without:
        yield f"no gradient: {', '.join(_without_numbers(without)[:4])}"
    moved = outputs(adapted, batch)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        again = ia3.PeftModel.from_pretrained(fresh, folder).eval()
        if not _close(outputs(again, batch), moved, 1e-6):
            yield "loaded into a fresh base it answers otherwise"
    merged = adapted.merge_and_unload()
    if not _close(outputs(merged, batch), moved, 1e-3):
        yield "merged it answers otherwise"


def _without_gradient(model: nn.Module, batch: dict[str, Any], vectors: dict[str, torch.Tensor]) -> Iterator[str]:
    torch.manual_seed(0)
    made = [value for value in _floats(model(**batch)) if value.requires_grad]
    torch.stack([(value * torch.randn_like(value)).sum() for value in made]).sum().backward()
    for name, vector in vectors.items():
        if vector.grad is None or not vector.grad.any():
            yield name.partition(".ia3_l")[0]


def outputs(model: nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The floating tensors that a forward returns."""
    torch.manual_seed(0)
    with torch.no_grad():
        return list(_floats(model(**batch)))


def _floats(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floats(item)


def _close(left: list[torch.Tensor], right: list[torch.Tensor], rtol: float) -> bool:
    return len(left) == len(right) and all(
        torch.allclose(
            a, b, rtol=rtol, atol=rtol * float(b.nan_to_num().abs().max()) if b.numel() else 0, equal_nan=True
        )
        for a, b in zip(left, right, strict=True)
    )


# In words


def in_words(sites: Iterable[Site]) -> str:
    """The names of a model's sites, each with what of it is multiplied."""
    words: dict[str, None] = {}
    for site in sites:
        name = _name(site.path)
        if site.side == "input":
            words[f"→ {name}"] = None
        elif site.intervals is None:
            words[name] = None
        else:
            words[f"{name} (keys and values of it)"] = None
    return ", ".join(words)


def _flow_in_words(flow: Flow) -> str:
    """The same of what a forward showed."""
    widths = flow.widths
    words: dict[str, None] = {}
    for attention in flow.attentions:
        for made in (attention.keys, attention.values):
            for path, intervals in made.items():
                whole = sum(stop - start for start, stop in intervals) == widths[path]
                shared = path in attention.keys and path in attention.values
                whole = whole or (shared and path not in attention.queries)
                words[_name(path) if whole else f"{_name(path)} (keys and values of it)"] = None
    words |= {f"→ {_name(found.path)}": None for found in flow.feedforwards}
    return ", ".join(words)


def _name(path: str) -> str:
    """The names behind the last number: what a module is called in its block."""
    return re.split(r"(?:^|\.)\d+(?:\.|$)", path)[-1] or path


def _without_numbers(sentences: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+\b", "N", sentence) for sentence in sentences))


def _short(error: BaseException) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:400]


# All of them


def survey(kinds: list[str], limit: int, results: Path) -> None:
    """A line of the file for each type, each in a process of its own."""
    for number, kind in enumerate(kinds, 1):
        start = time.monotonic()
        told = _in_a_process(kind, limit)
        told = {"type": kind, **told, "seconds": round(time.monotonic() - start, 1)}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
        said = told.get("reason") or told.get("differences") or told.get("failed") or told.get("sites", "")
        print(f"{number}/{len(kinds)} {kind}: {told['outcome']}  {str(said)[:120]}", flush=True)


def _in_a_process(kind: str, limit: int) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()  # what is imported once is there for all
    if not child:
        signal.alarm(limit)
        try:
            told = look(kind)
        except BaseException as error:
            told = {"outcome": "fails", "failed": [_short(error)]}
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(told))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    if text:
        return dict(json.loads(text))
    reason = f"not done in {limit} seconds" if os.WTERMSIG(status) == signal.SIGALRM else f"ended with status {status}"
    return {"outcome": "no twin", "reason": reason}


def told_so_far(results: Path) -> dict[str, dict[str, Any]]:
    """What the file says of each type; the last line counts."""
    if not results.exists():
        return {}
    lines = results.read_text(encoding="utf-8").splitlines()
    return {line["type"]: line for line in map(json.loads, lines)}


def table(told: dict[str, dict[str, Any]]) -> str:
    counts = Counter(line["outcome"] for line in told.values())
    attending = sum(counts[outcome] for outcome in ("true", "differs", "fails", "refused"))
    rows = [f"{counts[outcome]:5,}  {words}" for outcome, words in OUTCOMES.items()]
    true = counts["true"]
    rows.append(
        f"{len(told):5,}  types; {true:,} of {attending:,} with softmax attention, {true / max(attending, 1):.1%}"
    )
    return "\n".join(rows)


def page(told: dict[str, dict[str, Any]]) -> str:
    """docs/models.md."""
    counts = Counter(line["outcome"] for line in told.values())
    attending = sum(counts[outcome] for outcome in ("true", "differs", "fails", "refused"))
    parts = [
        INTRODUCTION.format(
            types=f"{len(told):,}",
            built=f"{len(told) - counts['no twin']:,}",
            attending=f"{attending:,}",
            true=f"{counts['true']:,}",
            version=machine()["transformers"],
        )
    ]
    for outcome, (title, prose, column, key) in SECTIONS.items():
        groups: dict[str, list[str]] = defaultdict(list)
        for kind, line in sorted(told.items()):
            if line["outcome"] == outcome:
                groups[_cell(line, key)].append(kind)
        if groups:
            parts.append(f"## {title}\n\n{prose}\n\n| {column} | types |\n|---|---|")
            ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
            parts[-1] += "".join(
                f"\n| {cell} | {', '.join(f'`{kind}`' for kind in kinds)} |" for cell, kinds in ordered
            )
    return "\n\n".join(parts) + "\n"


def _cell(line: dict[str, Any], key: str) -> str:
    if line["outcome"] == "no twin":
        return next(words for words, pattern in NOT_BUILT.items() if re.search(pattern, line["reason"]))
    value = line.get(key) or line.get("reason") or ""
    text = " ".join(value) if isinstance(value, list) else str(value)
    if key == "reason":
        text = text.replace(line["type"], "…").partition(": pass")[0]
    return text.replace("|", "/").replace("<", "&lt;")[:200]


NOT_BUILT = {
    "transformers has no model of this part alone": "transformers has no model of it",
    "a package is missing": r"ImportError|ModuleNotFoundError|No module named",
    "its default takes longer than the limit": "not done in",
    "it takes inputs of its own kind": r"missing \d+ required positional|must be passed|ou (must|have to) specify",
    "its default doesn't run, or not with the inputs that were tried": "",
}


INTRODUCTION = """# Which models

`IA3Config()` alone, without any target, finds the places of the vectors by a model's structure. Of the {types} model
types of transformers {version}, {built} can be built tiny from their default configuration, {attending} of these attend
by a softmax, and on {true} the vectors stand where the paper has them: on the keys, on the values and on the
feed-forward's intermediate of every block, and nowhere else.

What "where the paper has them" means is not decided by names. A tiny model of the type runs once; what goes into each
attention as keys, values and queries is traced back to the channels that make it, and each feed-forward is found by its
non-linearity. `ia3 targets MODEL --check` does the same for your model's own configuration. Then the adapted model must
equal its base at the start, give every vector a gradient, answer the same when loaded into a fresh base, and the same
when merged. `benchmarks/coverage.py` makes this page.

In the tables a name is a module of a block whose output is multiplied; an arrow stands before one whose input is."""

SECTIONS = {
    "true": (
        "As the paper says",
        "Nothing is to be set.",
        "vectors in a block",
        "sites",
    ),
    "differs": (
        "Adapted otherwise",
        "The default adapts these, and a forward says otherwise.",
        "what differs",
        "differences",
    ),
    "fails": ("Failing a check", "The places are the paper's, and a check fails.", "what fails", "failed"),
    "refused": (
        "Refused",
        "`IA3Config()` alone is an error here; give `target_modules` and `feedforward_modules`. What makes keys, "
        "values and intermediates, as a forward shows, stands on the left.",
        "what a forward shows",
        "flow",
    ),
    "no attention": (
        "Without softmax attention",
        "(IA)³ multiplies keys and values; these have none that a softmax weighs.",
        "what the error says",
        "reason",
    ),
    "no twin": (
        "Not built",
        "No tiny model of the default configuration runs here: a package is missing, the default is incomplete, or no "
        "rule makes its inputs. Your model's own configuration may well work.",
        "why",
        "reason",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "types", nargs="*", help="model types, looked at anew; all that are missing where none is given"
    )
    parser.add_argument("--shard", default="1/1", help="which part of the types, such as 2/4")
    parser.add_argument("--limit", type=int, default=90, help="seconds a type")
    parser.add_argument("--again", action="store_true", help="also those that aren't as the paper says")
    parser.add_argument("--table", action="store_true", help="only print the table and write the page")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    told = told_so_far(options.results)
    if not options.table:
        say_machine()
        _quiet()
        part, parts = map(int, options.shard.split("/"))
        known = {kind for kind, line in told.items() if line["outcome"] == "true" or not options.again}
        kinds = options.types or [kind for kind in list(CONFIG_MAPPING)[part - 1 :: parts] if kind not in known]
        survey(kinds, options.limit, options.results)
        told = told_so_far(options.results)
    print(table(told))
    if options.table:
        PAGE.write_text(page(told), encoding="utf-8")


def _quiet() -> None:
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    tiny_twin(CONFIG_MAPPING["llama"]())  # imports what most types need


if __name__ == "__main__":
    main()
