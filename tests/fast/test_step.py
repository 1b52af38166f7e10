"""A compiled step trains as the ordinary one does; what it can't do right, it leaves to the ordinary one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_llama import adapted_causal, texts_of
from test_t5 import adapted, batch_of
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import BertForQuestionAnswering, T5ForConditionalGeneration, get_linear_schedule_with_warmup

import ia3
from builders import models_own
from described import batch_for, described
from ia3 import IA3Config, get_peft_model
from ia3.fast import scores
from ia3.fast import step as stepping
from ia3.fast.batch import pack_seq2seq as pack
from ia3.fast.fused import FusedLoss
from ia3.fast.step import _make_capturable, _settings, _unrecordable, sum_gradients
from ia3.mixing import acting_flat
from ia3.state import attached

STEPS = 20


def optimiser_of(model: Any, **how: Any) -> tuple[Any, Any]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **{"lr": 0.02, "weight_decay": 0.0, **how})
    return optimizer, get_linear_schedule_with_warmup(optimizer, 3, STEPS)


def steady(model: Any) -> torch.optim.AdamW:
    """With a rate that no scheduler begins at zero."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)


def causal_batches() -> list[dict[str, Tensor]]:
    return [
        texts_of(rows=2 + step % 3, length=19 + step % 5, side=("right", "left")[step % 2]) for step in range(STEPS)
    ]


def start(tiny: Any, randomise: Any, form: str) -> tuple[Any, list[dict[str, Tensor]]]:
    """A model in fp32, and batches for it."""
    if form in ("llama", "qwen2"):
        return adapted_causal(tiny, randomise, form, torch.float32), causal_batches()
    return adapted(tiny, randomise, form, torch.float32), batches()


def batches() -> list[dict[str, Tensor]]:
    return [batch_of(rows=2 + step % 3, source=19 + step % 5, target=1 + step % 3) for step in range(STEPS)]


def train_as_usual(
    model: Any, data: list[dict[str, Tensor]], norm: float | None = None, decay: float = 0.0, **how: Any
) -> list[float]:
    optimizer, schedule = optimiser_of(model, **how)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = []
    for batch in data:
        loss = models_own(model, **batch).loss
        loss.backward()
        if norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, norm)
        with torch.no_grad():
            for vector in trained:
                vector.sub_((vector - 1) * optimizer.param_groups[0]["lr"] * decay)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def vectors_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("form", ["t5 gated", "mt5", "llama", "qwen2"])
@pytest.mark.parametrize(
    "more", [{}, {"norm": 0.5}, {"decay": 0.3}, {"weight_decay": 0.1, "betas": (0.8, 0.9)}], ids=str
)
def test_twenty_steps(tiny, randomise, form, more) -> None:
    usual, data = start(tiny, randomise, form)
    compiled = copy.deepcopy(usual)
    expected = train_as_usual(usual, data, **more)
    how = {name: value for name, value in more.items() if name not in ("norm", "decay")}
    optimizer, schedule = optimiser_of(compiled, **how)
    step = ia3.compile_step(
        compiled,
        optimizer,
        schedule,
        max_gradient_norm=more.get("norm"),
        weight_decay=more.get("decay", 0.0),
    )
    assert (step.path, step.reason) == ("fused", None)
    losses = [float(step(batch)) for batch in data]
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, vector in vectors_of(usual).items():
        torch.testing.assert_close(vectors_of(compiled)[name], vector, rtol=1e-4, atol=1e-5)
    assert schedule.get_last_lr() == [0.0]


def test_a_group_of_the_optimizer_may_be_empty(tiny, randomise) -> None:
    """As the usual split leaves it, where nothing that is trained shall decay."""
    usual = adapted(tiny, randomise, "t5 gated", torch.float32)
    compiled = copy.deepcopy(usual)
    expected = train_as_usual(usual, batches()[:3])
    trained = [parameter for parameter in compiled.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "weight_decay": 0.0}, {"params": [], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    step = ia3.compile_step(compiled, optimizer, get_linear_schedule_with_warmup(optimizer, 3, STEPS))
    assert step.path == "fused"
    assert [float(step(batch)) for batch in batches()[:3]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fast", [True, False], ids=["fused", "eager"])
def test_two_processes_that_have_the_same_batch_go_as_one(tiny, randomise, fast) -> None:
    """Each has half of all targets, so that the sum is the mean."""
    usual, data = start(tiny, randomise, "t5 gated")
    summed = copy.deepcopy(usual)
    if not fast:
        summed.get_input_embeddings().register_forward_hook(lambda module, args, output: None)
    sizes: list[int] = []

    def reduce(flat: Tensor) -> Tensor:
        sizes.append(flat.numel())
        return 2 * flat

    expected = train_as_usual(usual, data, norm=0.5, decay=0.3)
    optimizer, schedule = optimiser_of(summed)
    step = ia3.compile_step(summed, optimizer, schedule, max_gradient_norm=0.5, weight_decay=0.3, reduce=reduce)
    assert step.path == ("fused" if fast else "eager")
    losses = [float(step(batch, 0.5)) for batch in data]
    assert losses == pytest.approx(expected, rel=1e-5)
    trained = vectors_of(summed)
    assert sizes == [sum(map(Tensor.numel, trained.values())) + 1 + len(trained)] * len(data)
    for name, vector in vectors_of(usual).items():
        torch.testing.assert_close(trained[name], vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fast", [True, False], ids=["fused", "eager"])
def test_a_weight_is_for_several_processes(tiny, randomise, fast) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    step = ia3.compile_step(model, steady(model) if fast else sgd(model))
    before = vectors_of(model)
    for weight in (0.5, torch.tensor(1.0)):
        with pytest.raises(ValueError, match="pass `reduce` to compile_step"):
            step(batch_of(), weight)
    assert all(torch.equal(vector, before[name]) for name, vector in vectors_of(model).items())
    step(batch_of(), 1.0)


def test_gradients_that_some_process_lacks() -> None:
    """None stays none where nobody has one, so that an optimizer leaves the parameter alone."""
    first, second, third = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    first.grad = torch.tensor([1.0, 2.0])
    others = torch.tensor([3.0, 4.0, 5.0, 6.0, 0.0, 0.0, 7.0, 1.0, 1.0, 0.0])
    loss = sum_gradients([first, second, third], torch.tensor(1.0), lambda flat: flat + others, 0.5)
    assert float(loss) == 7.5
    assert first.grad.tolist() == [3.5, 5.0]
    assert second.grad is not None
    assert second.grad.tolist() == [5.0, 6.0]
    assert third.grad is None


def test_the_ordinary_step_with_the_reason(tiny, randomise) -> None:
    usual = get_peft_model(tiny("bloom"), IA3Config(task_type="CAUSAL_LM"))
    ids = torch.randint(2, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    optimizer, schedule = optimiser_of(usual)
    step = ia3.compile_step(usual, optimizer, schedule, max_gradient_norm=1.0, weight_decay=0.1)
    assert step.path == "eager"
    assert step.reason == "a bloom is not described"
    losses = [float(step({"input_ids": ids, "labels": ids})) for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in usual.parameters())


def two_adapters(model: Any) -> Any:
    model.add_adapter("other", IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.set_adapter(["default", "other"])
    return optimiser_of(model)[0]


def merged(model: Any) -> Any:
    optimizer = optimiser_of(model)[0]
    model.merge_adapter()
    return optimizer


def a_head_too(model: Any) -> Any:
    model.lm_head.weight.requires_grad_()
    return optimiser_of(model)[0]


def sgd(model: Any) -> Any:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def half_of_the_vectors(model: Any) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad][::2], lr=0.1)


def amsgrad(model: Any) -> Any:
    return optimiser_of(model, amsgrad=True)[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (two_adapters, "exactly one adapter must act"),
        (merged, "exactly one adapter must act, and none be merged"),
        (a_head_too, "shared.weight is trained"),
        (sgd, "written for torch's AdamW, and this is SGD"),
        (half_of_the_vectors, "the optimizer's parameters are not the adapter's vectors"),
        (amsgrad, "without amsgrad"),
    ],
)
def test_what_it_leaves_to_the_ordinary_step(tiny, randomise, make, said) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    step = ia3.compile_step(model, make(model))
    assert step.path == "eager"
    assert said in (step.reason or "")


def one_cycle(optimizer: Any, **how: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, **how)


def up_and_down(optimizer: Any, **how: Any) -> Any:
    return lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, **how)


def one_behind_another(optimizer: Any, **how: Any) -> Any:
    first = lr_scheduler.ConstantLR(optimizer)
    return lr_scheduler.SequentialLR(optimizer, [first, one_cycle(optimizer, **how)], milestones=[2])


@pytest.mark.parametrize("make", [one_cycle, up_and_down, one_behind_another])
def test_a_graph_does_not_follow_betas(tiny, randomise, monkeypatch, make) -> None:
    """What is called each time does."""
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    optimizer = steady(model)
    scheduler = make(optimizer)
    step = ia3.compile_step(model, optimizer, scheduler)
    assert (step.path, step.reason) == ("fused", None)
    for _ in range(3):
        step(batch_of())
    reason = _unrecordable(torch.device("cuda"), scheduler)
    assert "pass cycle_momentum=False" in (reason or "")
    assert _unrecordable(torch.device("cuda"), make(optimizer, cycle_momentum=False)) is None
    assert _unrecordable(torch.device("cuda"), None) is None
    monkeypatch.setattr(stepping, "_unrecordable", lambda device, each: _unrecordable(torch.device("cuda"), each))
    step = ia3.compile_step(model, optimizer, scheduler)
    assert (step.path, step.reason) == ("eager", reason)
    step(batch_of())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_recorded_step_steps_aside_for_betas_that_change(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32).cuda()
    optimizer = steady(model)
    step = ia3.compile_step(model, optimizer, one_cycle(optimizer))
    assert step.path == "eager"
    for _ in range(3):
        step(batch_of())


def test_a_module_around_the_model_is_named(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    name = type(model).__name__
    for around in (torch.compile(model), torch.nn.DataParallel(model)):
        step = ia3.compile_step(around, steady(model))
        said = f"a {type(around).__name__} stands around the {name}: pass the model itself"
        assert (step.path, step.reason) == ("eager", said)
    bare = ia3.compile_step(tiny("t5"), steady(tiny("t5")))
    assert bare.reason == "exactly one adapter must act, and none be merged"


def test_changes_behind_its_back_are_errors(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    step = ia3.compile_step(model, optimiser_of(model)[0])
    batch = batch_of()
    step(batch)
    with pytest.raises(ValueError, match=r"The batch holds \['attention_mask', 'input_ids'\]"):
        step({name: tensor for name, tensor in batch.items() if name != "labels"})
    with model.disable_adapter(), pytest.raises(RuntimeError, match="acting alone"):
        step(batch)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="acting alone"):
        step(batch)
    model.unmerge_adapter()
    step(batch)
    model.to(torch.float64)
    with pytest.raises(RuntimeError, match="moved, cast, unloaded"):
        step(batch)


def test_laying_out_shows_in_no_file_and_unloading_ends_it(tiny, randomise, tmp_path) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    plain = copy.deepcopy(model)
    step = ia3.compile_step(model, optimiser_of(model)[0])
    keys = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    assert model.state_dict().keys() == keys.keys()
    assert all(torch.equal(tensor, keys[name]) for name, tensor in model.state_dict().items())
    for each, folder in ((model, "fused"), (plain, "plain")):
        each.save_pretrained(tmp_path / folder)
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("fused", "plain")]
    assert files[0] == files[1]
    q, k = (model.encoder.block[0].layer[0].SelfAttention.get_submodule(part).weight for part in "qk")
    assert q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
    laid_out = q.data_ptr()
    assert k.data_ptr() == laid_out + q.numel() * q.element_size()
    base = model.unload()
    assert q.data_ptr() != laid_out
    assert not any(name.startswith("_ia3") for name in base.__dict__)
    base.save_pretrained(tmp_path / "base")
    plain.unload().save_pretrained(tmp_path / "plain base")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("base", "plain base")]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="carries no adapter"):
        step(batch_of())


def test_merging_while_laid_out(tiny, randomise, output) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    expected = output(model)
    ia3.compile_step(model, optimiser_of(model)[0])
    torch.testing.assert_close(output(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_laying_out_twice_moves_nothing(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    first = ia3.compile_step(model, optimiser_of(model)[0])
    second = ia3.compile_step(model, optimiser_of(model)[0])
    batch = batch_of()
    assert float(first(batch)) > 0
    assert float(second(batch)) > 0


@pytest.mark.parametrize("form", ["t5 gated", "t5"])
@pytest.mark.parametrize("training", [False, True], ids=["still", "dropout"])
def test_recomputing_changes_no_step(tiny, randomise, form, training) -> None:
    start = adapted(tiny, randomise, form, torch.float64).train(training)

    def losses_of(recompute: bool) -> list[float]:
        model = copy.deepcopy(start)
        step = ia3.compile_step(model, *optimiser_of(model), recompute=recompute)
        torch.manual_seed(3)
        return [float(step(batch)) for batch in batches()]

    assert losses_of(True) == pytest.approx(losses_of(False), rel=1e-12)


def test_recomputing_keeps_less(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    layout = attached(model).adapters["default"].layout
    packed, table = pack(batch_of(rows=4)), torch.ones(1, layout.size, requires_grad=True)

    def kept(recompute: bool) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            FusedLoss(model, layout, recompute=recompute)(packed, table)
        return sum(sizes)

    assert kept(True) < 0.6 * kept(False)


def test_recomputing_is_the_fast_steps(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    with pytest.raises(ValueError, match=r"takes the ordinary one, since it is written for torch's AdamW"):
        ia3.compile_step(model, sgd(model), recompute=True)


def grown_bias(model: Any) -> None:
    with torch.no_grad():
        model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.add_(1)


def other_weight(model: Any) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.o.weight"
    model.load_state_dict({name: torch.zeros_like(model.get_parameter(name))}, strict=False, assign=True)


def other_vector(model: Any) -> None:
    name = next(name for name, _ in model.named_parameters() if ".ia3_l." in name)
    model.load_state_dict({name: torch.zeros_like(model.get_parameter(name))}, strict=False, assign=True)


def adapter_of_the_same_name(model: Any) -> None:
    model.add_adapter("other", IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.set_adapter("default")


def hook(model: Any) -> None:
    model.encoder.register_forward_hook(lambda *_: None)


def other_embeddings(model: Any) -> None:
    model.resize_token_embeddings(80)


@pytest.mark.parametrize(
    "change", [grown_bias, other_weight, other_vector, adapter_of_the_same_name, hook, other_embeddings]
)
def test_what_a_step_would_not_hear_is_an_error(tiny, randomise, change) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    step = ia3.compile_step(model, optimiser_of(model)[0])
    step(batch_of())
    change(model)
    with pytest.raises(RuntimeError, match="make the step again"):
        step(batch_of())


def first_vector(model: Any) -> torch.nn.Parameter:
    found: torch.nn.Parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    return found


def hook_at_a_vector(model: Any, optimizer: Any, call: Callable[..., None]) -> Any:
    return first_vector(model).register_hook(call)


def hook_behind_a_gradient(model: Any, optimizer: Any, call: Callable[..., None]) -> Any:
    return first_vector(model).register_post_accumulate_grad_hook(call)


def hook_before_the_optimizer(model: Any, optimizer: Any, call: Callable[..., None]) -> Any:
    return optimizer.register_step_pre_hook(call)


def hook_behind_the_optimizer(model: Any, optimizer: Any, call: Callable[..., None]) -> Any:
    return optimizer.register_step_post_hook(call)


def hook_of_all_optimizers(model: Any, optimizer: Any, call: Callable[..., None]) -> Any:
    return register_optimizer_step_post_hook(call)


@pytest.mark.parametrize(
    "register",
    [
        *(hook_at_a_vector, hook_behind_a_gradient),
        *(hook_before_the_optimizer, hook_behind_the_optimizer, hook_of_all_optimizers),
    ],
)
def test_hooks_of_vectors_and_optimizers_are_called_or_asked_for(tiny, randomise, register) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    optimizer, calls = optimiser_of(model)[0], []
    before = ia3.compile_step(model, optimizer)
    before(batch_of())
    handle = register(model, optimizer, lambda *_: calls.append(1))
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"hook was registered at .* make the step again"):
                before(batch_of())
        step = ia3.compile_step(model, optimizer)
        assert step.path == "eager"
        assert "carries a hook" in (step.reason or "")
        step(batch_of())
        step(batch_of())
        assert len(calls) == 2
    finally:
        handle.remove()
    before(batch_of())
    assert len(calls) == 2


def test_gradients_from_before_count(tiny, randomise, caplog) -> None:
    """Such as a regulariser's; the steps without any stay fused."""
    usual = adapted(tiny, randomise, "t5 gated", torch.float32)
    compiled = copy.deepcopy(usual)

    def regularise(model: Any) -> None:
        sum(((vector - 1) ** 2).sum() for vector in model.parameters() if vector.requires_grad).backward()

    optimizer = steady(usual)
    for number, batch in enumerate(batches()[:4]):
        if number != 1:
            regularise(usual)
        models_own(usual, **batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    step = ia3.compile_step(compiled, steady(compiled))
    with caplog.at_level("INFO", logger="ia3"):
        for number, batch in enumerate(batches()[:4]):
            if number != 1:
                regularise(compiled)
            step(batch)
            assert all(parameter.grad is None for parameter in compiled.parameters())
    for name, vector in vectors_of(usual).items():
        torch.testing.assert_close(vectors_of(compiled)[name], vector, rtol=1e-4, atol=1e-5)
    assert step.path == "fused"
    assert caplog.text.count("there are gradients from before") == 1


def test_a_step_that_failed_leaves_no_gradients(tiny, randomise, monkeypatch) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    optimizer = steady(model)
    step = ia3.compile_step(model, optimizer)
    step(batch_of())
    monkeypatch.setattr(optimizer, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(batch_of())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_of_all_modules_are_called(tiny, randomise, caplog) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    step, calls = ia3.compile_step(model, steady(model)), []
    expected = float(step(batch_of()))
    with caplog.at_level("INFO", logger="ia3"):
        handle = register_module_forward_hook(lambda module, *_: calls.append(module))
        try:
            loss = float(step(batch_of()))
        finally:
            handle.remove()
    assert len({id(module) for module in calls}) > 20
    assert loss < expected
    assert "the ordinary one, since hooks are registered for all modules" in caplog.text
    calls.clear()
    step(batch_of())
    assert (calls, step.path) == ([], "fused")


def test_autocast_is_the_ordinary_steps(tiny, randomise, caplog) -> None:
    usual = adapted(tiny, randomise, "t5 gated", torch.float32)
    compiled = copy.deepcopy(usual)
    step = ia3.compile_step(compiled, steady(compiled))
    with caplog.at_level("INFO", logger="ia3"), torch.autocast("cpu", torch.bfloat16):
        expected = train_as_usual(usual, batches()[:3])
        losses = [float(step(batch)) for batch in batches()[:3]]
    assert losses[0] == expected[0]
    assert caplog.text.count("the ordinary one, since autocast is on") == 1
    own = float(models_own(compiled, **batch_of()).loss.detach())
    assert float(step(batch_of())) == pytest.approx(own, rel=1e-5)
    assert (step.path, step.reason) == ("fused", None)


def test_what_is_loaded_in_place_is_heard(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    step = ia3.compile_step(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0))
    step(batch_of())
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.q.weight.mul_(2)
    assert float(step(batch_of())) == pytest.approx(float(models_own(model, **batch_of()).loss.detach()), rel=1e-5)


def test_a_forward_of_its_own_is_left_alone(tiny, randomise) -> None:
    class Smoothed(T5ForConditionalGeneration):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = tiny("t5")
    model.__class__ = Smoothed
    model = randomise(get_peft_model(model, IA3Config(task_type="SEQ_2_SEQ_LM")))
    step = ia3.compile_step(model, optimiser_of(model)[0])
    assert step.reason == "a Smoothed has a forward of its own"


def test_modules_trained_in_full_are_left_to_the_model(tiny, randomise) -> None:
    model = get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM", modules_to_save=["lm_head"]))
    model.set_adapter("default", inference_mode=True)
    assert scores.unsupported_reason(model, attached(model).adapters["default"].layout) == "lm_head is trained in full"


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_weights_of_several_kinds_are_left_to_the_model(tiny, half) -> None:
    model = tiny("t5").to(half)
    model.encoder.block[0].layer[1].DenseReluDense.wo.float()
    model = get_peft_model(model, IA3Config(task_type="SEQ_2_SEQ_LM"))
    said = "float16, in which" if half is torch.float16 else "torch.bfloat16, torch.float32"
    assert said in (scores.unsupported_reason(model, attached(model).adapters["default"].layout) or "")


def test_the_ordinary_step_decays_vectors_alone_at_their_own_rates(tiny) -> None:
    model = get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM", modules_to_save=["lm_head"]))
    vectors = {name: p for name, p in model.named_parameters() if ".ia3_l." in name}
    heads = [p for name, p in model.named_parameters() if p.requires_grad and name not in vectors]
    still, moving = list(vectors.values())[:2], list(vectors.values())[2:]
    with torch.no_grad():
        for vector in vectors.values():
            vector.fill_(2)
    groups = [{"params": still, "lr": 0.0}, {"params": moving, "lr": 1e-6}, {"params": heads, "lr": 1e-6}]
    step = ia3.compile_step(model, torch.optim.SGD(groups, lr=0.1), weight_decay=1e5)
    assert step.path == "eager"
    before = [head.detach().clone() for head in heads]
    step(batch_of())
    assert all(bool((vector == 2).all()) for vector in still)
    assert all(float((vector - 1.9).abs().max()) < 1e-3 for vector in moving)
    assert all(float((one - other).abs().max()) < 1e-3 for one, other in zip(heads, before, strict=True))


def test_weights_laid_out_while_predicting_can_be_trained_through(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    batch = batch_of()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        layout, flat = acting_flat(model)  # type: ignore[misc]
        scores.ChoiceScores(model, torch.tensor([[5, 1], [6, 1]]), layout)(**inputs, flat=flat)
    models_own(model, **batch).loss.backward()


def test_batches_as_collators_make_them(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5 gated", torch.float32)
    step = ia3.compile_step(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0))
    batch = batch_of()
    given = {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
    assert float(step(given)) == float(step(batch))
    whole = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    assert float(step(whole)) == pytest.approx(float(models_own(model, **whole).loss.detach()), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="decoder_input_ids are not its labels moved by one"):
        step({**batch, "decoder_input_ids": batch["labels"].clamp(min=0)})


def test_a_rate_moves_to_the_device_of_its_graph(tiny, randomise) -> None:
    model = adapted(tiny, randomise, "t5", torch.float32)
    optimizer = optimiser_of(model)[0]
    given = torch.tensor(0.02, dtype=torch.float64)
    optimizer.param_groups[0]["lr"] = given
    _make_capturable(optimizer, torch.device("cpu"))
    rate = optimizer.param_groups[0]["lr"]
    assert (rate.dtype, float(rate)) == (torch.float32, pytest.approx(0.02))
    before = _settings(optimizer)
    assert _settings(optimizer) == before
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)
    assert _settings(optimizer) != before


def test_a_batch_that_only_an_encoders_own_forward_takes_is_an_ordinary_step(caplog) -> None:
    """Padded on the left, or of questions and answers."""
    usual, compiled = described("bert", torch.float32), described("bert", torch.float32)
    data = [batch_for("bert"), batch_for("bert", left=True), batch_for("bert", seed=2)]
    expected = train_as_usual(usual, data)
    step = ia3.compile_step(compiled, *optimiser_of(compiled))
    with caplog.at_level("INFO", logger="ia3"):
        assert [float(step(batch)) for batch in data] == pytest.approx(expected, rel=1e-4)
    assert "pad on the right" in caplog.text
    assert (step.path, step.reason) == ("fused", None)
    answers = get_peft_model(
        BertForQuestionAnswering(compiled.config), IA3Config(target_modules=["key"], feedforward_modules=[])
    ).train()
    step = ia3.compile_step(answers, torch.optim.AdamW([p for p in answers.parameters() if p.requires_grad], lr=0.1))
    ids = torch.tensor([[5, 6, 7, 8]])
    places = torch.tensor([1])
    found = [step({"input_ids": ids, "start_positions": places, "end_positions": places}) for _ in range(3)]
    assert found[2] < found[0]
