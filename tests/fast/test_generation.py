"""Generation by steps that stay in place: the tokens of the model's own `generate`. Nothing is recorded on a CPU."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import builders
from described import FORMS, batch_for, described
from ia3 import IA3Config, get_peft_model
from ia3.fast.capture import GraphedCallable
from ia3.fast.generate import Decoder, compile_generate, unsupported_reason
from ia3.fast.sessions import CausalSession, FusedSession, Session, Size
from ia3.mixing import gather_rows
from ia3.rows import BASE, acting
from ia3.sites import Layout
from replayed import recording

ENDS = [1, 5, 9]
NEW = 12
SEQ2SEQ, CAUSAL = ("t5", "t5-gated", "mt5"), ("llama", "qwen2", "gpt2", "gpt_neox", "opt", "phi", "falcon-multi-query")


def lively(model: Any) -> Any:
    """The model with larger weights, so that its answers differ and end at different lengths."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def prompts(model: Any, rows: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths, padded where the model wants it."""
    ids = torch.randint(10, 64, (rows, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        missing = (3 * row) % 8
        if model.config.is_encoder_decoder:
            mask[row, 9 - missing :] = 0
        else:
            mask[row, :missing] = 0
    return ids.masked_fill(mask == 0, 0), mask


def expected(model: Any, ids: torch.Tensor, mask: torch.Tensor, **settings: Any) -> torch.Tensor:
    return model.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, **settings)


@pytest.mark.parametrize("family", [*SEQ2SEQ, *CAUSAL])
def test_the_tokens_of_generate(tiny, family) -> None:
    model = lively(tiny(family))
    settings = {"max_new_tokens": NEW, "eos_token_id": ENDS}
    assert unsupported_reason(model, **settings) is None
    decoder = Decoder(model, **settings)
    found = []
    for rows, seed in ((5, 0), (3, 1), (5, 2), (1, 3)):
        ids, mask = prompts(model, rows, seed)
        found.append(decoder(ids, mask))
        assert torch.equal(found[-1], expected(model, ids, mask, **settings))
    assert len(decoder.sessions) == 1  # smaller batches are filled up
    assert len({tuple(row[-NEW:].tolist()) for row in found[0]}) > 2


@pytest.mark.parametrize("family", ["t5-gated", "mt5", "llama", "gpt2", "falcon-multi-query"])
def test_replays_of_what_was_recorded(tiny, family) -> None:
    model = lively(mixed_model(tiny, family))
    settings = {"max_new_tokens": NEW, "eos_token_id": list(range(32)), "min_length": 13}
    with recording() as recorded:
        decoder = Decoder(model, **settings)
        for seed, names in enumerate((None, ["a", BASE], None, ["b", "a"], ["b"], None, ["default", "a"])):
            ids, mask = (part[:, seed % 3 :] for part in prompts(model, 2 if names is None else len(names), seed))
            mixture = {} if names is None else {"adapter_names": names}
            assert torch.equal(decoder(ids, mask, **mixture), expected(model, ids, mask, **mixture, **settings))
    assert len(recorded) == 4  # the prompt and a step, of one adapter and of a mixture


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": 5},
        {"eos_token_id": None},
        {"eos_token_id": ENDS, "pad_token_id": 7},
        {"eos_token_id": ENDS, "min_length": 12},
        {"eos_token_id": ENDS, "min_new_tokens": 6},
        {"eos_token_id": ENDS, "min_length": 4, "min_new_tokens": 2},
        {"eos_token_id": ENDS, "temperature": 0.1, "top_k": 3, "repetition_penalty": 1.0},
    ],
    ids=str,
)
def test_settings(tiny, family, settings) -> None:
    model = lively(tiny(family))
    model.generation_config.eos_token_id = settings["eos_token_id"]
    settings = {"max_new_tokens": NEW, **settings}
    assert unsupported_reason(model, **settings) is None
    decoder = Decoder(model, **settings)
    for seed in range(3):
        ids, mask = prompts(model, 4, seed)
        assert torch.equal(decoder(ids, mask), expected(model, ids, mask, **settings))


def test_it_stops_where_every_row_has_ended(tiny) -> None:
    model = lively(tiny("llama"))
    ids, mask = prompts(model)
    whole = Decoder(model, max_new_tokens=NEW, eos_token_id=None)(ids, mask)[:, 9:]
    ends = whole[:, 2].unique().tolist()
    settings = {"max_new_tokens": NEW, "eos_token_id": ends}
    decoder = Decoder(model, **settings)
    found = decoder(ids, mask)
    assert found.shape[1] <= 9 + 3
    assert torch.equal(found, expected(model, ids, mask, **settings))
    (session,) = decoder.sessions
    assert isinstance(session, FusedSession)
    assert int(session.decoding.place.max()) == found.shape[1] - 1  # no step was made in vain


@pytest.mark.parametrize("least", [{"min_new_tokens": 3}, {"min_new_tokens": 4}, {"min_length": 4}, {"min_length": 5}])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_an_end_is_written_as_soon_as_it_may_be(tiny, family, least) -> None:
    model = lively(tiny(family))
    ids, mask = prompts(model)
    if family == "llama" and "min_length" in least:
        least = {"min_length": 9 + least["min_length"]}
    settings = {"max_new_tokens": 6, "eos_token_id": list(range(32)), **least}
    found = Decoder(model, **settings)(ids, mask)
    assert torch.equal(found, expected(model, ids, mask, **settings))
    assert (found == model.generation_config.pad_token_id).any()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["mt5", "llama"])
def test_attention_implementations(tiny, family, implementation) -> None:
    model = lively(tiny(family))
    model.set_attn_implementation(implementation)
    ids, mask = prompts(model)
    settings = {"max_new_tokens": NEW, "eos_token_id": ENDS}
    assert torch.equal(Decoder(model, **settings)(ids, mask), expected(model, ids, mask, **settings))


def mixed_model(tiny: Any, family: str) -> Any:
    model = get_peft_model(lively(tiny(family)), IA3Config(task_type=tiny_task(family)))
    for name in ("a", "b"):
        model.add_adapter(name, IA3Config(task_type=tiny_task(family)))
    builders.randomise(model, spread=1.0)
    return model


def tiny_task(family: str) -> str:
    return "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM"


def test_a_merged_t5_has_no_vectors_to_read(tiny) -> None:
    model = mixed_model(tiny, "t5")
    ids, mask = prompts(model)
    decoder = Decoder(model, max_new_tokens=3)
    found = decoder(ids, mask)
    assert [size.layout.size > 0 for size in decoder.fused] == [True]
    model.merge_adapter()
    assert torch.equal(decoder(ids, mask), found)
    assert [size.layout.size for size in decoder.fused] == [0]


@pytest.mark.parametrize("family", ["t5", "bart", "llama"])
@pytest.mark.parametrize("ends", [[], [3], ENDS])
def test_an_end_is_forced_at_the_last_token(tiny, family, ends) -> None:
    model = lively(tiny(family))
    ids, mask = prompts(model)
    for length in (1, 2, NEW):
        settings = {"max_new_tokens": length, "eos_token_id": ends or None, "forced_eos_token_id": 3, "pad_token_id": 0}
        assert unsupported_reason(model, **settings) is None
        found = Decoder(model, **settings)(ids, mask)
        assert torch.equal(found, expected(model, ids, mask, **settings))
        assert (found[:, -1] == 3).any()


@pytest.mark.parametrize("form", ["bart", "plbart", "mbart", "pegasus", "marian", "umt5"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_every_described_encoder_decoder_is_written_by_the_block(form, everywhere) -> None:
    scaled = {"scale_embedding": False} if form == "plbart" else {}  # with it PLBart repeats itself
    model = lively(described(form, torch.float32, everywhere=everywhere, **scaled).eval())
    model.add_adapter("a", IA3Config(task_type="SEQ_2_SEQ_LM"))
    builders.randomise(model, spread=1.0)
    settings = {"max_new_tokens": NEW, "eos_token_id": [3], "forced_eos_token_id": None, "min_length": 0}
    settings |= {"num_beams": 1, "no_repeat_ngram_size": 0, "bos_token_id": 1}
    decoder = Decoder(model, **settings)
    for names in (None, ["a", BASE, "default", "a"]):
        batch = {name: tensor for name, tensor in batch_for(form).items() if name != "labels"}
        more = {} if names is None else {"adapter_names": names}
        found = decoder(**batch, **more)
        assert torch.equal(found, model.generate(**batch, **settings, **more))
        assert len({tuple(row.tolist()) for row in found}) > 1
    assert decoder.fused


def of_mode(task: str) -> list[str]:
    return [form for form, (_, of_form, _) in FORMS.items() if of_form == task]


@pytest.mark.parametrize("form", of_mode("CAUSAL_LM"))
@pytest.mark.parametrize("everywhere", [False, True])
def test_every_described_decoder_is_written_by_the_block(form, everywhere) -> None:
    model = lively(described(form, torch.float64, everywhere=everywhere).eval())
    model.add_adapter("a", IA3Config(task_type="CAUSAL_LM"))
    builders.randomise(model, spread=1.0)
    settings = {"max_new_tokens": NEW, "eos_token_id": [3]}
    assert unsupported_reason(model, **settings) is None
    decoder = Decoder(model, **settings)
    for names in (None, ["a", BASE, "default", "a"]):
        batch = {name: tensor for name, tensor in batch_for(form, left=True).items() if name != "labels"}
        more = {} if names is None else {"adapter_names": names}
        found = decoder(**batch, **more)
        assert torch.equal(found, model.generate(**batch, **settings, do_sample=False, **more))
        assert len({tuple(row.tolist()) for row in found}) > 1
    assert len(decoder.fused) == 2


@pytest.mark.parametrize("family", ["t5", "mt5", "llama", "gpt2"])
def test_one_session_serves_any_mixture(tiny, family) -> None:
    model = mixed_model(tiny, family)
    settings = {"max_new_tokens": NEW, "eos_token_id": ENDS}
    assert unsupported_reason(model, **settings) is None
    decoder = Decoder(model, **settings)
    mixtures = [["a", "b", BASE, "default", "a"], ["b", "b", "a"], ["default", BASE, "b", "b", "a"], ["b"]]
    for seed, names in enumerate(mixtures):
        ids, mask = prompts(model, len(names), seed)
        found = decoder(ids, mask, adapter_names=names)
        assert torch.equal(found, expected(model, ids, mask, adapter_names=names, **settings))
        alone = [expected(model, ids[i : i + 1], mask[i : i + 1], adapter_names=[name], **settings)[0]
                 for i, name in enumerate(names)]  # fmt: skip
        assert all(torch.equal(row[: len(one)], one) for row, one in zip(found, alone, strict=True))
    assert len(decoder.sessions) == 1
    ids, mask = prompts(model)
    assert not torch.equal(
        decoder(ids, mask, adapter_names=["a"] * 5)[:, -NEW:], decoder(ids, mask, adapter_names=["b"] * 5)[:, -NEW:]
    )


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_rows_that_act_already_are_heard(tiny, family) -> None:
    """As in a sweep, whose evaluations mix the vectors of its runs."""
    model = mixed_model(tiny, family)
    ids, mask = prompts(model)
    settings = {"max_new_tokens": NEW, "eos_token_id": ENDS}
    decoder, names = Decoder(model, **settings), ["b", "a", "b", "b", "a"]
    plain = decoder(ids, mask)
    with acting(gather_rows(model, names)):
        found = decoder(ids, mask)
    assert torch.equal(found, expected(model, ids, mask, adapter_names=names, **settings))
    assert torch.equal(decoder(ids, mask), plain)
    assert found.shape != plain.shape or not torch.equal(found, plain)


@pytest.mark.parametrize("family", ["t5", "llama", "falcon-multi-query"])
def test_autocast_is_the_models_own_generates(tiny, caplog, family) -> None:
    model = lively(tiny(family))
    ids, mask = prompts(model)
    settings = {"max_new_tokens": NEW, "eos_token_id": ENDS}
    decoder = Decoder(model, **settings)
    with caplog.at_level("INFO", logger="ia3"), torch.autocast("cpu", torch.bfloat16):
        found = [decoder(ids, mask) for _ in range(2)]
        assert torch.equal(found[0], expected(model, ids, mask, **settings))
    assert torch.equal(*found)
    assert not decoder.sessions
    assert caplog.text.count("the model's own way, since autocast is on") == 1
    assert torch.equal(decoder(ids, mask), expected(model, ids, mask, **settings))
    assert decoder.sessions


def test_a_mixture_may_change_a_fused_layers_queries(tiny) -> None:
    model = mixed_model(tiny, "gpt2")
    decoder = Decoder(model, max_new_tokens=3)
    explicit = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
    model.add_adapter("every channel", IA3Config(task_type="CAUSAL_LM", **explicit))
    builders.randomise(model, spread=1.0)
    ids, mask = prompts(model, 2)
    for number, names in enumerate((["a", "b"], ["a", "every channel"]), 1):
        wanted = expected(model, ids, mask, max_new_tokens=3, adapter_names=names)
        assert torch.equal(decoder(ids, mask, adapter_names=names), wanted)
        assert (len(decoder.fused), len(decoder.causal)) == (number, 0)


def test_a_mixture_of_the_base_alone_has_no_queries_to_look_at(tiny) -> None:
    model = mixed_model(tiny, "gpt2")
    ids, mask = prompts(model, 2)
    with model.disable_adapter():
        wanted = expected(model, ids, mask, max_new_tokens=3)
    assert torch.equal(Decoder(model, max_new_tokens=3)(ids, mask, adapter_names=[BASE, BASE]), wanted)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_bare_model_knows_no_names(tiny, family) -> None:
    model = lively(tiny(family))
    ids, mask = prompts(model, 1)
    with pytest.raises(ValueError, match="adapter"):
        Decoder(model, max_new_tokens=2)(ids, mask, adapter_names=["a"])


def test_one_session_serves_adapters_of_other_sites(tiny) -> None:
    model = get_peft_model(lively(tiny("llama")), IA3Config(task_type="CAUSAL_LM"))
    model.add_adapter("k", IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]))
    model.add_adapter("q", IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=["q_proj"]))
    builders.randomise(model, spread=1.0)
    settings = {"max_new_tokens": NEW, "eos_token_id": ENDS}
    decoder = Decoder(model, **settings)
    sessions = []
    for names in (["default", "k"], ["k", BASE], [BASE, BASE], ["q", "default"], ["k", "q"], ["default", "k"]):
        ids, mask = prompts(model, 2)
        wanted = expected(model, ids, mask, adapter_names=names, **settings)
        assert torch.equal(decoder(ids, mask, adapter_names=names), wanted)
        sessions.append((len(decoder.fused), len(decoder.causal)))
    assert sessions == [(1, 0), (1, 0), (1, 0), (1, 1), (1, 1), (1, 1)]  # inputs of queries are the own forward's


def test_the_active_adapter_is_followed(tiny) -> None:
    model = mixed_model(tiny, "llama")
    settings = {"max_new_tokens": NEW, "eos_token_id": ENDS}
    decoder = Decoder(model, **settings)
    ids, mask = prompts(model)
    found = []
    for name in ("default", "a", "default"):
        model.set_adapter(name)
        model.requires_grad_(False)
        found.append(decoder(ids, mask))
        assert torch.equal(found[-1], expected(model, ids, mask, **settings))
    assert found[0].tolist() != found[1].tolist()
    with model.disable_adapter():
        assert torch.equal(decoder(ids, mask), expected(model, ids, mask, **settings))


def test_what_was_recorded_is_forgotten_when_the_model_changes(tiny) -> None:
    model = mixed_model(tiny, "t5")
    decoder = Decoder(model, max_new_tokens=3)
    ids, mask = prompts(model)

    def sessions() -> list[Any]:
        decoder(ids, mask)
        return decoder.sessions

    first = sessions()
    with torch.no_grad():
        model.shared.weight.mul_(1.5)  # in place: a recording reads what is there
    assert sessions() == first
    model.set_adapter("a")
    second = sessions()
    assert second != first
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    third = sessions()
    assert third != second
    model.delete_adapter("a")
    model.add_adapter("a", IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.set_adapter("a")
    assert sessions() != third


@pytest.mark.parametrize("family", ["t5", "llama", "falcon-multi-query"])
def test_another_generation_configuration_is_heard(tiny, family) -> None:
    model = lively(tiny(family))
    ids, mask = prompts(model)
    settings = {"max_new_tokens": NEW}
    model.generation_config.eos_token_id = None
    with recording():
        decoder = Decoder(model, **settings)
        whole = decoder(ids, mask)
        assert torch.equal(whole, expected(model, ids, mask, **settings))
        before = decoder.sessions
        assert torch.equal(decoder(ids, mask), whole)
        assert decoder.sessions == before
        ends = whole[:, -NEW + 2].unique().tolist()
        model.generation_config.eos_token_id = ends
        shorter = decoder(ids, mask)
        assert torch.equal(shorter, expected(model, ids, mask, **settings))
        assert shorter.shape[1] < whole.shape[1]
        ends.append(int(whole[0, -NEW + 1]))  # in place
        assert torch.equal(decoder(ids, mask), expected(model, ids, mask, **settings))
        model.generation_config.repetition_penalty = 1.5
        assert torch.equal(decoder(ids, mask), expected(model, ids, mask, **settings))
        assert (decoder.path, decoder.reason) == ("eager", "repetition_penalty is 1.5")
        model.generation_config.repetition_penalty = 1.0
        assert torch.equal(decoder(ids, mask), expected(model, ids, mask, **settings))
        assert (decoder.path, decoder.reason) == ("static", None)


@pytest.mark.parametrize("family", ["t5", "llama", "falcon-multi-query"])
def test_a_call_may_ask_for_fewer_tokens(tiny, family) -> None:
    """As where a model's positions end; what was recorded serves it."""
    model = lively(tiny(family))
    settings = {"max_new_tokens": NEW, "eos_token_id": ENDS, "forced_eos_token_id": 3, "pad_token_id": 0}
    with recording() as recorded:
        decoder = Decoder(model, **settings)
        generate = compile_generate(model, **settings)
        for seed, most in enumerate((None, None, 1, 4, None, 7, NEW)):
            ids, mask = prompts(model, seed=seed)
            wanted = expected(model, ids, mask, **{**settings, "max_new_tokens": most or NEW})
            assert torch.equal(decoder(ids, mask, max_new_tokens=most), wanted)
            assert torch.equal(generate(ids, mask, max_new_tokens=most), wanted)
    assert len(decoder.sessions) == 1
    assert len(recorded) == 2
    for wrong in (0, NEW + 1):
        for each in (decoder, generate):
            with pytest.raises(ValueError, match=f"max_new_tokens is {wrong}: a call may ask for 1 to {NEW}"):
                each(ids, mask, max_new_tokens=wrong)


def test_few_sizes_are_kept(tiny) -> None:
    model = lively(tiny("llama"))
    decoder = Decoder(model, max_new_tokens=2)
    for length in (5, 100, 170, 230, 300, 360):
        ids = torch.randint(10, 64, (1, length))
        assert torch.equal(
            decoder(ids, torch.ones_like(ids)), expected(model, ids, torch.ones_like(ids), max_new_tokens=2)
        )
    assert len(decoder.fused) == 4


def test_lengths_of_a_bucket_share_a_session(tiny) -> None:
    model = lively(tiny("llama"))
    decoder = Decoder(model, max_new_tokens=4)
    for length in (20, 40, 64):
        ids, mask = torch.randint(10, 64, (3, length)), torch.ones(3, length, dtype=torch.long)
        mask[1, : length // 2] = 0
        assert torch.equal(decoder(ids, mask), expected(model, ids, mask, max_new_tokens=4))
    assert len(decoder.sessions) == 1


def test_a_change_of_the_way_leaves_no_recording_of_old_weights(tiny) -> None:
    """The block puts weights next to each other, away from where the own forward's recordings read them."""
    model = get_peft_model(lively(tiny("llama")), IA3Config(task_type="CAUSAL_LM"))
    model.add_adapter("q", IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=["q_proj"]))
    builders.randomise(model, spread=1.0)
    decoder = Decoder(model, max_new_tokens=4)
    for names, sessions in ((["q", BASE], (0, 1)), (["default", BASE], (1, 0)), (["q", "default"], (1, 1))):
        ids, mask = prompts(model, 2)
        wanted = expected(model, ids, mask, max_new_tokens=4, adapter_names=names)
        assert torch.equal(decoder(ids, mask, adapter_names=names), wanted)
        assert (len(decoder.fused), len(decoder.causal)) == sessions


def test_long_inputs(tiny) -> None:
    model = lively(tiny("mt5"))
    decoder = Decoder(model, max_new_tokens=40)
    for length in (16, 64, 17, 130, 65):
        ids = torch.randint(10, 64, (2, length))
        mask = torch.ones_like(ids)
        mask[1, length - 3 :] = 0
        assert torch.equal(decoder(ids, mask), expected(model, ids, mask, max_new_tokens=40))


def test_prompts_padded_on_the_right_and_empty_batches_go_to_generate(tiny) -> None:
    model = lively(tiny("llama"))
    decoder = Decoder(model, max_new_tokens=3)
    ids, mask = prompts(model)
    assert torch.equal(decoder(ids, mask.flip(1)), expected(model, ids, mask.flip(1), max_new_tokens=3))
    assert not decoder.sessions


def test_modules_trained_in_full_go_to_generate_in_a_mixture(tiny) -> None:
    config = {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}
    model = builders.adapted(lively(tiny("llama", tie_word_embeddings=False)), "a", **config)
    with torch.no_grad():
        model.lm_head.modules_to_save["a"].weight.mul_(-1)
    settings = {"max_new_tokens": 4, "eos_token_id": ENDS}
    decoder = Decoder(model, **settings)
    ids, mask = prompts(model)
    names = ["a", "default", BASE, "a", "a"]
    assert torch.equal(
        decoder(ids, mask, adapter_names=names), expected(model, ids, mask, adapter_names=names, **settings)
    )
    assert not decoder.sessions
    assert torch.equal(decoder(ids, mask), expected(model, ids, mask, **settings))
    assert decoder.causal


def test_wrong_names_are_refused_before_any_work(tiny) -> None:
    model = mixed_model(tiny, "t5")
    decoder = Decoder(model, max_new_tokens=3)
    ids, mask = prompts(model)
    with pytest.raises(ValueError, match="There are 2 adapter_names for 5 examples"):
        decoder(ids, mask, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match=r"Unknown adapter_names \['c'\]"):
        decoder(ids, mask, adapter_names=["a", "b", "c", "a", "b"])
    assert not decoder.sessions


@pytest.mark.parametrize("family", ["t5", "llama", "falcon-multi-query"])
def test_nothing_is_looked_at_on_the_host(tiny, family) -> None:
    """Tensors without values can't be: what a graph records is then the same for all of them."""
    decoder = Decoder(lively(tiny(family)).to("meta"), max_new_tokens=NEW, eos_token_id=ENDS, min_new_tokens=2)
    shapes: dict[str, Any] = {
        "tokens": (64, torch.long),
        "cu_seqlens": (4, torch.int32),
        "labels": ((3, 1), torch.long),
    }
    session: Session
    if family != "falcon-multi-query":
        session, fixed = FusedSession(decoder.model, decoder.plan, Size(3, 64, 16, False, Layout(()))), (16, False)
    else:
        shapes, fixed = {name: ((3, 16), torch.long) for name in ("input_ids", "attention_mask")}, ()
        session = CausalSession(decoder.model, decoder.plan, 3, CausalSession.cache_len(16, NEW))
    batch = {name: torch.ones(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    with torch.inference_mode():
        assert session.prefill(*fixed, **batch).shape == ()
        assert session.decode_step().shape == ()


class Operations(TorchDispatchMode):
    """How often each operation is started; a view and a cast to what it is already start nothing."""

    VIEWS = ("view", "_unsafe_view", "t", "transpose", "slice", "expand", "unsqueeze", "detach", "select")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name not in self.VIEWS and not (name == "to" and result is args[0]):
            self.counts[name] += 1
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_step_of_the_own_forward_adds_one_product_a_site(tiny, dtype) -> None:
    sites = {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["q_proj", "down_proj"]}
    model = builders.adapted(tiny("llama", dtype=dtype), "a", **builders.CAUSAL, **sites)
    assert model.get_parameter("model.layers.0.mlp.down_proj.ia3_l.a").dtype == torch.float32
    decoder = Decoder(model, max_new_tokens=8, min_new_tokens=8)
    ids, mask = prompts(model)
    decoder(ids, mask, adapter_names=["a", "default", "a", "a", BASE])
    (ready,) = decoder.causal.values()
    assert ready.vectors is not None
    model.disable_adapters()
    with torch.inference_mode():
        ready.session.prefill(**ready.session.fit(ids, mask))
        with Operations() as bare:
            ready.session.decode_step()
        with acting(ready.vectors), Operations() as mixed:
            ready.session.decode_step()
    assert mixed.counts - bare.counts == Counter({"mul": 2 * 3})  # queries, values and feed-forward of two blocks


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_on_a_cpu_the_models_own_generate_stays(tiny, family) -> None:
    model = lively(tiny(family))
    generate = compile_generate(model, max_new_tokens=NEW, eos_token_id=ENDS)
    assert (generate.path, generate.reason) == ("eager", "there is no GPU")
    ids, mask = prompts(model)
    assert torch.equal(generate(ids, mask), expected(model, ids, mask, max_new_tokens=NEW, eos_token_id=ENDS))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 2}, "num_beams is 2"),
        ({"do_sample": True}, "do_sample is True"),
        ({"forced_bos_token_id": 3}, "forced_bos_token_id is 3"),
        ({"forced_eos_token_id": [3, 4]}, r"forced_eos_token_id is \[3, 4\]"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size is 2"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1.2"),
        ({"suppress_tokens": [3]}, r"suppress_tokens is \[3\]"),
        ({"bad_words_ids": [[3]]}, r"bad_words_ids is \[\[3\]\]"),
        ({"stop_strings": ["."]}, r"stop_strings is \['\.'\]"),
        ({"max_time": 1.0}, "max_time is 1.0"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is True"),
        ({"streamer": object()}, "it knows nothing of streamer"),
        ({"max_new_tokens": None}, "max_new_tokens is not given"),
    ],
)
def test_settings_that_it_does_not_honour(tiny, settings, reason) -> None:
    model = tiny("t5")
    found = unsupported_reason(model, **{"max_new_tokens": 3, **settings})
    assert found is not None
    assert re.fullmatch(reason, found)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "BloomForCausalLM"),
        ("mistral", "not every layer"),
        ("gemma2", "not every layer"),
    ],
)
def test_models_that_it_is_not_written_for(tiny, monkeypatch, family, reason) -> None:
    if family != "bloom":  # a family that is not described
        monkeypatch.setattr("ia3.fast.fused.architecture_of", lambda model: None)
    found = unsupported_reason(tiny(family), max_new_tokens=3)
    assert found is not None
    assert reason in found


def test_models_in_a_state_that_it_is_not_right_for(tiny) -> None:
    model = tiny("llama")
    assert unsupported_reason(model, max_new_tokens=3) is None
    assert unsupported_reason(tiny("bert"), max_new_tokens=3) is not None
    model.config._attn_implementation = "flex_attention"
    assert "flex_attention" in str(unsupported_reason(model, max_new_tokens=3))
    model.config._attn_implementation = "sdpa"
    model.lm_head.to("meta")
    assert unsupported_reason(model, max_new_tokens=3) == "the model is spread over several devices"
    assert unsupported_reason(tiny("llama").train(), max_new_tokens=3) == "the model is in training mode"
    scaled = tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert "depend on the longest" in str(unsupported_reason(scaled, max_new_tokens=3))


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    ran = []
    total = torch.zeros(1)

    def function(times: int, *, x: torch.Tensor) -> torch.Tensor:
        ran.append(len(x))
        total.add_(x.sum())
        return x * times

    with recording() as recorded:
        computation = GraphedCallable(function, torch.device("cpu"))
        for factor in range(1, 5):
            x = factor * torch.arange(3.0)
            assert torch.equal(computation(2, x=x), 2 * x)
            assert float(total) == 3 * factor * (factor + 1) / 2
        assert (ran, len(recorded)) == ([3, 3], 1)
        computation(2, x=torch.ones(4))
        computation(3, x=torch.ones(4))
        assert (ran, len(recorded)) == ([3, 3, 4, 4], 1)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@on_gpu
@pytest.mark.parametrize("family", ["t5-gated", "mt5", "llama", "gpt2"])
def test_captured_steps_write_what_generate_does(tiny, family) -> None:
    model = lively(mixed_model(tiny, family)).double().cuda()
    settings = {"max_new_tokens": NEW, "eos_token_id": ENDS, "min_new_tokens": 3}
    generate = compile_generate(model, **settings)
    assert (generate.path, generate.reason) == ("captured", None)
    for seed, names in enumerate((None, ["a", BASE, "b"], None, ["b", "a", "a"], ["b"], None, ["default", "a", BASE])):
        ids, mask = prompts(model, 3 if names is None else len(names), seed)
        mixture = {} if names is None else {"adapter_names": names}
        wanted = expected(model, ids.cuda(), mask.cuda(), **mixture, **settings)
        assert torch.equal(generate(ids, mask, **mixture), wanted)
    model.set_adapter("a")
    assert torch.equal(generate(ids, mask), expected(model, ids.cuda(), mask.cuda(), **settings))


@on_gpu
def test_captured_steps_end_early(tiny) -> None:
    model = lively(tiny("llama", dtype=torch.float64)).cuda()
    ids, mask = prompts(model)
    generate = compile_generate(model, max_new_tokens=100, eos_token_id=list(range(64)))
    for _ in range(3):
        assert generate(ids, mask).shape == (5, 10)
    (session,) = generate.sessions
    assert int(session.decoding.place.max()) < 9 + 10


def test_a_batch_of_one_after_a_large_one_is_small(tiny) -> None:
    model = mixed_model(tiny, "t5")
    decoder = Decoder(model, max_new_tokens=2)
    for rows, length in ((40, 8), (1, 90), (39, 8)):
        ids = torch.randint(10, 60, (rows, length), generator=torch.Generator().manual_seed(rows))
        mask = torch.ones_like(ids)
        assert torch.equal(decoder(ids, mask), expected(model, ids, mask, max_new_tokens=2))
    assert [(size.examples, size.total_tokens) for size in decoder.fused] == [(1, 128), (64, 512)]


def test_a_mask_with_a_hole_goes_through_the_forward(tiny) -> None:
    model = mixed_model(tiny, "t5")
    ids, mask = prompts(model)
    mask[0, 1] = 0
    decoder = Decoder(model, max_new_tokens=3)
    assert torch.equal(decoder(ids, mask), expected(model, ids, mask, max_new_tokens=3))
    assert not decoder.fused


def test_modules_trained_in_full_are_written_by_the_model(tiny) -> None:
    model = get_peft_model(lively(tiny("t5")), IA3Config(task_type="SEQ_2_SEQ_LM", modules_to_save=["lm_head"]))
    builders.randomise(model)
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.normal_()
    ids, mask = prompts(model)
    for names in ({}, {"adapter_names": ["default", BASE, "default", BASE, BASE]}):
        found = Decoder(model.eval(), max_new_tokens=4)(ids, mask, **names)
        assert torch.equal(found, expected(model, ids, mask, max_new_tokens=4, **names))
