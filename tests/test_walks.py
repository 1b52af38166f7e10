"""Random walks over the facade against a reference that only multiplies."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ia3 import IA3Config, PeftModel, PeftWarning, get_peft_model

LAYERS = ["embed", "biased", "plain", "transposed", "conv1", "grouped1", "conv2", "grouped2", "conv3", "grouped3"]


@st.composite
def configs(draw) -> dict[str, Any]:
    targets = draw(st.sets(st.sampled_from(LAYERS), min_size=1, max_size=5))
    inputs = draw(st.sets(st.sampled_from(sorted(targets)))) - {"embed"}
    saved = draw(st.sets(st.sampled_from(sorted({*LAYERS} - targets)), max_size=1))
    return {"target_modules": targets, "feedforward_modules": inputs, "modules_to_save": sorted(saved) or None}


class Reference:
    """What an adapter is: vectors by (path, side), and the state of the modules that it trains in full."""

    def __init__(self, vectors, copies) -> None:
        self.vectors, self.copies = vectors, copies

    @classmethod
    def of(cls, model, name, inputs, saved) -> Reference:
        vectors = {}
        for path, module in model.named_modules():
            if "ia3_l" in module._modules and name in module.ia3_l._parameters:
                value = module.ia3_l.get_parameter(name).detach().clone()
                side = "input" if path in inputs else "output"
                vectors[path, side] = value.view(-1) if value.dim() == 2 else value
        copies = {path: model.get_submodule(path).modules_to_save[name].state_dict() for path in saved}
        return cls(vectors, {path: {k: v.clone() for k, v in state.items()} for path, state in copies.items()})


def together(references) -> bool:
    """Whether adapters can act together."""
    copies = [path for reference in references for path in reference.copies]
    sites = {path for reference in references for path, _ in reference.vectors}
    return len(copies) == len(set(copies)) and not sites & set(copies)


class Walk(RuleBasedStateMachine):
    make: Any
    ids = torch.tensor([[1, 4, 0, 9, 10], [7, 7, 2, 3, 5]])

    def __init__(self) -> None:
        super().__init__()
        self.model, self.base = self.make(torch.float64), self.make(torch.float64)
        self.adapters: dict[str, Reference] = {}
        self.active: list[str] = []
        self.merged: list[str] | None = None
        self.count = 0

    def output(self, model) -> torch.Tensor:
        with torch.no_grad():
            return model(self.ids)

    def expected(self, names) -> torch.Tensor:
        model = self.make(torch.float64)
        for reference in (self.adapters[name] for name in names):
            for path, state in reference.copies.items():
                model.get_submodule(path).load_state_dict(state)
            for (path, side), vector in reference.vectors.items():
                module = model.get_submodule(path)
                if side == "input":
                    module.register_forward_pre_hook(lambda module, args, vector=vector: (args[0] * vector,))
                else:
                    module.register_forward_hook(lambda module, args, output, vector=vector: output * vector)
        return self.output(model)

    def new_name(self) -> str:
        self.count += 1
        return f"a{self.count:03}"

    def some(self, data, most=3) -> list[str]:
        return data.draw(st.lists(st.sampled_from(sorted(self.adapters)), min_size=1, max_size=most, unique=True))

    @rule(config=configs(), seed=st.integers(0, 99))
    def add(self, config, seed):
        name = self.new_name()
        if self.adapters:
            self.model.add_adapter(name, IA3Config(**config))
        else:
            get_peft_model(self.model, IA3Config(**config), adapter_name=name)
            self.active = [name]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if key.endswith(f".ia3_l.{name}") or f".modules_to_save.{name}." in key:
                    parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 2
        saved = config["modules_to_save"] or []
        self.adapters[name] = Reference.of(self.model, name, config["feedforward_modules"], saved)

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def choose(self, data):
        names = self.some(data)
        if not together([self.adapters[name] for name in names]):
            with pytest.raises(ValueError, match="one of them at a time"):
                self.model.set_adapter(names)
            return
        self.model.set_adapter(names)
        if self.merged is not None and {*names} != {*self.merged}:
            self.merged = None
        self.active = names

    @precondition(lambda self: len(self.adapters) > 1)
    @rule(data=st.data())
    def delete(self, data):
        name = self.some(data, most=1)[0]
        if name in (self.merged or ()):
            with pytest.raises(ValueError, match="is merged"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        del self.adapters[name]
        self.active = [other for other in self.active if other != name] or [min(self.adapters)]

    @precondition(lambda self: self.adapters)
    @rule()
    def merge(self):
        merged = list(dict.fromkeys([*(self.merged or ()), *self.active]))
        if not together([self.adapters[name] for name in merged]):
            with pytest.raises(ValueError, match="one of them at a time"):
                self.model.merge_adapter()
            return
        with pytest.warns(PeftWarning, match="merged already") if self.merged else nullcontext():
            self.model.merge_adapter()
        self.merged = merged

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = None

    @precondition(lambda self: self.adapters)
    @rule()
    def disable(self):
        with self.model.disable_adapter():
            assert torch.equal(self.output(self.model), self.output(self.base))

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def save_and_load(self, data):
        name, new = self.some(data, most=1)[0], self.new_name()
        with TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            self.model.load_adapter(Path(folder) / name, new)
            elsewhere = PeftModel.from_pretrained(self.make(torch.float64), Path(folder) / name)
        torch.testing.assert_close(self.output(elsewhere), self.expected([name]), rtol=1e-9, atol=1e-9)
        self.adapters[new] = self.adapters[name]

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), kind=st.sampled_from(["mean", "sum"]))
    def combine(self, data, kind):
        names, new = self.some(data), self.new_name()
        sources = [self.adapters[name] for name in names]
        weights = [0.5 + 0.25 * index for index in range(len(names))]
        sites = {site for source in sources for site in source.vectors}
        one_side = len({path for path, _ in sites}) == len(sites)
        if not one_side or sum(bool(source.copies) for source in sources) > 1 or not together(sources):
            with pytest.raises(ValueError, match=r"both the input|no combination"):
                self.model.add_weighted_adapter(names, weights, new, kind)
            return
        self.model.add_weighted_adapter(names, weights, new, kind)
        one, total = torch.ones((), dtype=torch.float64), sum(weights) if kind == "mean" else 1
        vectors = {
            site: sum(w * source.vectors.get(site, one) for w, source in zip(weights, sources, strict=True)) / total
            for site in sites
        }
        self.adapters[new] = Reference(vectors, {k: v for source in sources for k, v in source.copies.items()})

    @precondition(lambda self: self.adapters and self.merged is None)
    @rule()
    def unload(self):
        self.model.unload()
        assert type(self.model) is type(self.base)
        assert sorted(self.model.__dict__) == sorted(self.base.__dict__)
        for (key, parameter), (wanted, original) in zip(
            self.model.named_parameters(), self.base.named_parameters(), strict=True
        ):
            assert key == wanted
            assert torch.equal(parameter, original)
            assert parameter.requires_grad
        self.adapters, self.active = {}, []

    @invariant()
    def the_output_is_the_references(self):
        if not self.adapters:
            assert torch.equal(self.output(self.model), self.output(self.base))
        elif self.merged is None or self.merged == self.active:
            assert self.model.active_adapters == self.active
            torch.testing.assert_close(self.output(self.model), self.expected(self.active), rtol=1e-7, atol=1e-9)


def test_any_order_of_calls(zoo):
    """Shrinking a walk takes minutes, so a failure shows the walk as it was."""
    walk = type("WalkInZoo", (Walk,), {"make": staticmethod(zoo)})
    phases = [Phase.explicit, Phase.generate]
    run_state_machine_as_test(walk, settings=settings(max_examples=40, stateful_step_count=25, phases=phases))
