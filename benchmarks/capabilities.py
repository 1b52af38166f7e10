"""What (IA)³ can do in PEFT and here: each row is a probe that runs in both.

    python benchmarks/capabilities.py

A probe that raises, or whose comparison fails, is a no. The table is the one in docs/from-peft.md.

Needs: CPU; peft; about a minute.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bench import write

Probe = Callable[[Any], bool]
PROBES: dict[str, Probe] = {}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def probe(row: str) -> Callable[[Probe], Probe]:
    def keep(function: Probe) -> Probe:
        PROBES[row] = function
        return function

    return keep


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, **more)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4)).eval()


def drawn(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l." in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def adapted(lib: Any, base: Any = None, *more: str, **config: Any) -> Any:
    """A causal model with the adapter "default" and more of them, all with random vectors."""
    model = lib.get_peft_model(base if base is not None else llama(), lib.IA3Config(**config))
    for name in more:
        model.add_adapter(name, lib.IA3Config(**config))
    return drawn(model).eval()


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if ".ia3_l." not in name]


def layer(lib: Any, module: nn.Module, value: torch.Tensor) -> bool:
    """A layer of one kind carries a vector that multiplies its output."""
    base = nn.Sequential(module)
    expected = copy.deepcopy(base)(value)
    model = lib.get_peft_model(base, lib.IA3Config(target_modules=["0"], feedforward_modules=[]))
    vector = next(p for name, p in model.named_parameters() if ".ia3_l." in name)
    torch.nn.init.constant_(vector, 2.0)
    return close(model(value), 2 * expected)


for _row, _module, _value in (
    ("linear layers", lambda: nn.Linear(4, 6), torch.randn(3, 4)),
    ("1-D convolutions", lambda: nn.Conv1d(4, 6, 3), torch.randn(3, 4, 9)),
    ("2-D convolutions", lambda: nn.Conv2d(4, 6, 3), torch.randn(3, 4, 9, 9)),
    ("3-D convolutions", lambda: nn.Conv3d(4, 6, 3), torch.randn(3, 4, 5, 5, 5)),
    ("grouped convolutions", lambda: nn.Conv2d(4, 6, 3, groups=2), torch.randn(3, 4, 9, 9)),
    ("embeddings", lambda: nn.Embedding(10, 6), torch.tensor([[1, 2, 3]])),
):
    PROBES[f"vectors at {_row}"] = lambda lib, module=_module, value=_value: layer(lib, module(), value)


@probe("vectors at GPT-2's `Conv1D`")
def _(lib: Any) -> bool:
    model = adapted(lib, gpt2())
    return not close(logits(model), logits(gpt2()))


@probe("keys and values alone of a fused projection, by default")
def _(lib: Any) -> bool:
    base = gpt2()
    expected = base.transformer.h[0].attn.c_attn(torch.ones(1, 16))[:, :16]
    model = adapted(lib, base)
    found = next(module for name, module in model.named_modules() if name.endswith("h.0.attn.c_attn"))
    return close(found(torch.ones(1, 16))[:, :16], expected)


@probe("layers chosen by number (`layers_to_transform`)")
def _(lib: Any) -> bool:
    model = adapted(lib, target_modules=["k_proj"], feedforward_modules=[], layers_to_transform=[1])
    names = [name for name, _ in model.named_parameters() if ".ia3_l." in name]
    return len(names) == 1 and "layers.1." in names[0]


@probe("modules trained in full (`modules_to_save`)")
def _(lib: Any) -> bool:
    model = adapted(lib, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    return any("lm_head" in name and p.requires_grad for name, p in model.named_parameters())


@probe("several adapters, one active")
def _(lib: Any) -> bool:
    model = adapted(lib, None, "b")
    first = logits(model)
    model.set_adapter("b")
    return not close(logits(model), first)


@probe("several active at once, through the model")
def _(lib: Any) -> bool:
    model = adapted(lib, None, "b")
    model.set_adapter(["default", "b"])
    return len(model.active_adapters) == 2


@probe("a batch that mixes adapters (`adapter_names`)")
def _(lib: Any) -> bool:
    model = adapted(lib, None, "b")
    first = logits(model)
    mixed = logits(model, adapter_names=["default", "b"])
    model.set_adapter("b")
    return close(mixed[0], first[0]) and close(mixed[1], logits(model)[1])


@probe("disabling adapters")
def _(lib: Any) -> bool:
    model = adapted(lib)
    with model.disable_adapter():
        trains = any(p.requires_grad for p in model.parameters())
        return close(logits(model), logits(llama())) and not trains


@probe("deleting an adapter, the last one too")
def _(lib: Any) -> bool:
    model = adapted(lib, None, "b")
    model.delete_adapter("b")
    model.delete_adapter("default")
    return model.active_adapters == [] and close(logits(model), logits(llama()))


@probe("adding and activating one after the last was deleted")
def _(lib: Any) -> bool:
    model = adapted(lib)
    model.delete_adapter("default")
    model.add_adapter("b", lib.IA3Config())
    model.set_adapter("b")
    return model.active_adapters == ["b"] and not close(logits(drawn(model)), logits(llama()))


@probe("merging")
def _(lib: Any) -> bool:
    model = adapted(lib)
    before = logits(model)
    model.merge_adapter()
    return close(logits(model), before)


@probe("merging again, and one after the other")
def _(lib: Any) -> bool:
    one, both = adapted(lib, None, "b"), adapted(lib, None, "b")
    both.merge_adapter(["default", "b"])
    one.merge_adapter(["default"])
    one.merge_adapter(["b"])
    one.merge_adapter(["b"])
    return close(logits(one), logits(both))


@probe("unmerging, to the very bits")
def _(lib: Any) -> bool:
    model = adapted(lib)
    before = weights(model)
    model.merge_adapter()
    model.unmerge_adapter()
    return all(torch.equal(one, other) for one, other in zip(weights(model), before, strict=True))


@probe("unmerging a vector with a zero")
def _(lib: Any) -> bool:
    model = adapted(lib)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".ia3_l." in name).zero_()
    before = logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    return close(logits(model), before)


@probe("`merge_and_unload`")
def _(lib: Any) -> bool:
    model = adapted(lib)
    before = logits(model)
    merged = model.merge_and_unload()
    return type(merged) is LlamaForCausalLM and close(logits(merged), before)


@probe("`unload`, no trace left")
def _(lib: Any) -> bool:
    names = llama().state_dict().keys()
    base = adapted(lib).unload()
    return base.state_dict().keys() == names and close(logits(base), logits(llama()))


@probe("weighted combinations")
def _(lib: Any) -> bool:
    model = adapted(lib, None, "b")
    model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "mean")
    vectors = {name: p for name, p in model.named_parameters() if ".ia3_l." in name}
    sites = [name.removesuffix(".mean") for name in vectors if name.endswith(".mean")]
    return all(close(vectors[f"{s}.mean"], (vectors[f"{s}.default"] + vectors[f"{s}.b"]) / 2) for s in sites)


@probe("combinations by task arithmetic and TIES")
def _(lib: Any) -> bool:
    model = adapted(lib, None, "b")
    model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "ties", combination_type="ties", density=0.5)
    return "ties" in model.peft_config


@probe("saving and loading")
def _(lib: Any) -> bool:
    model = adapted(lib)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return close(logits(lib.PeftModel.from_pretrained(llama(), folder)), logits(model))


@probe("loading with `low_cpu_mem_usage`")
def _(lib: Any) -> bool:
    model = adapted(lib)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = lib.PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=True)
        return close(logits(loaded), logits(model))


@probe("hotswapping (`hotswap_adapter`)")
def _(lib: Any) -> bool:
    from importlib import import_module

    other = drawn(adapted(lib), seed=5)
    model = adapted(lib)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        import_module(f"{lib.__name__}.utils.hotswap").hotswap_adapter(model, folder, "default")
    return close(logits(model), logits(other))


@probe("an adapter's tensors in and out (`get_peft_model_state_dict`)")
def _(lib: Any) -> bool:
    model, other = adapted(lib), drawn(adapted(lib), seed=5)
    lib.set_peft_model_state_dict(other, lib.get_peft_model_state_dict(model))
    return close(logits(other), logits(model))


@probe("the same, inside DataParallel")
def _(lib: Any) -> bool:
    model = adapted(lib)
    return lib.get_peft_model_state_dict(nn.DataParallel(model)).keys() == lib.get_peft_model_state_dict(model).keys()


@probe("the base's tensors in and out (`get_base_model_state_dict`)")
def _(lib: Any) -> bool:
    tensors = lib.get_base_model_state_dict(adapted(lib))
    model = adapted(lib)
    lib.set_base_model_state_dict(model, tensors)
    return tensors.keys() == llama().state_dict().keys()


@probe("an adapter injected into any module (`inject_adapter_in_model`)")
def _(lib: Any) -> bool:
    model = lib.inject_adapter_in_model(lib.IA3Config(), llama())
    return type(model) is LlamaForCausalLM and not close(logits(drawn(model)), logits(llama()))


@probe("gradient checkpointing, reentrant too")
def _(lib: Any) -> bool:
    found = []
    for reentrant in (None, False, True):
        model = adapted(lib).train()
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS).logits.pow(2).sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    return all(close(one, other) for grads in found[1:] for one, other in zip(grads, found[0], strict=True))


@probe("`torch.compile`, one graph")
def _(lib: Any) -> bool:
    model = adapted(lib)
    return close(logits(torch.compile(model, fullgraph=True, backend="aot_eager")), logits(model))


@probe("switching adapters of a compiled model without compiling again")
def _(lib: Any) -> bool:
    torch._dynamo.reset()
    model = adapted(lib, None, *(f"a{number}" for number in range(4)))
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    logits(compiled)
    once = graphs
    for number in range(4):
        model.set_adapter(f"a{number}", inference_mode=True)
        if not close(logits(compiled), logits(model)):
            return False
    return graphs <= once + 1  # the first vectors trained, the others don't


@probe("fp32 vectors in a bf16 model")
def _(lib: Any) -> bool:
    model = adapted(lib, llama().bfloat16())
    return {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32} and bool(
        logits(model).isfinite().all()
    )


@probe("fp32 copies of modules trained in full in a bf16 model")
def _(lib: Any) -> bool:
    model = adapted(lib, llama().bfloat16(), modules_to_save=["lm_head"])
    head = [p for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad]
    return {p.dtype for p in head} == {torch.float32} and bool(logits(model).isfinite().all())


@probe("mixed precision by `cast_mixed_precision_params`")
def _(lib: Any) -> bool:
    model = adapted(lib)
    lib.cast_mixed_precision_params(model, torch.bfloat16)
    return {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@probe("a dynamically quantised int8 base, unmerged")
def _(lib: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}, dtype=torch.qint8)
        before = logits(base)
        return not close(logits(adapted(lib, base)), before)


@probe("`prepare_model_for_kbit_training`")
def _(lib: Any) -> bool:
    return not any(p.requires_grad for p in lib.prepare_model_for_kbit_training(llama().half()).parameters())


@probe("generation")
def _(lib: Any) -> bool:
    return adapted(lib).generate(input_ids=IDS, max_new_tokens=2, do_sample=False).shape[1] > IDS.shape[1]


@probe("generation that mixes adapters in a batch")
def _(lib: Any) -> bool:
    model = adapted(lib, None, "b")
    arguments = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mixed = model.generate(input_ids=IDS, adapter_names=["default", "b"], **arguments).logits[0]
    model.set_adapter("b")
    return close(mixed[1], model.generate(input_ids=IDS, **arguments).logits[0][1])


@probe("status by layer and model")
def _(lib: Any) -> bool:
    model = adapted(lib)
    return len(model.get_layer_status()) == 6 and model.get_model_status().active_adapters == ["default"]


@probe("deep copies and pickles")
def _(lib: Any) -> bool:
    import pickle

    model = adapted(lib)
    return close(logits(pickle.loads(pickle.dumps(copy.deepcopy(model)))), logits(model))


def answer(row: str, lib: Any) -> bool:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(PROBES[row](lib))
        except Exception as error:
            print(f"{lib.__name__}: {row}: {type(error).__name__}: {str(error)[:120]}", file=sys.stderr)
            return False


def table(rows: dict[str, dict[str, str]]) -> str:
    """The table of the documentation."""
    lines = ["| | PEFT | ia3 |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row} | {found['peft']} | {found['ia3']} |" for row, found in rows.items())])


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    import peft

    import ia3

    logging.getLogger("ia3").setLevel(logging.ERROR)
    rows = {row: {lib.__name__: "yes" if answer(row, lib) else "no" for lib in (peft, ia3)} for row in PROBES}
    write("capabilities", {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
