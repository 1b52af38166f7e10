from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import builders
import ia3.gguf
from ia3 import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, IA3Config, get_peft_model
from ia3.bundled import load_model
from ia3.gguf import _facts, from_gguf, is_gguf, model_from_gguf

gguf = pytest.importorskip("gguf")

BLOCKS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
CHATS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def gguf_name(name: str) -> str:
    """A Llama's weight as the format names it."""
    module = name.removesuffix(".weight")
    if module in WHOLE:
        return f"{WHOLE[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{BLOCKS[rest]}.weight"


def as_stored(name: str, weight: torch.Tensor, heads: dict[str, int]) -> torch.Tensor:
    """The format pairs each rotary channel with its neighbour, transformers with the one half a head away."""
    for module, count in heads.items():
        if module in name:
            return weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return weight


def write_gguf(path: Path, model: torch.nn.Module, kind: Any = None, without: str = "") -> Path:
    """A Llama with a byte tokenizer as a file, its matrices quantised to a kind."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = ["<s>", "</s>", *map(chr, range(ord("A"), ord("A") + 60)), "AB", "CD"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 62)
    writer.add_token_merges(["A B", "C D"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHATS)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == without:
            continue
        values = as_stored(name, weight, heads).contiguous().numpy()
        if kind is None or values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A tiny Llama as a GGUF file, and the model itself."""
    model = builders.llama()
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model), model


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> Path:
    """A Llama of quantised blocks, whose floats depend on the precision that they are made in."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "q4.gguf", model, gguf.GGMLQuantizationType.Q4_1)


IDS = torch.tensor([[5, 9, 33, 2, 60]])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("IA3_CACHE", str(folder))
    return folder


def read_of_the_file(auto_class: Any, path: Path, **arguments: Any) -> Any:
    """What transformers alone makes of the file."""
    if auto_class not in (AutoConfig, AutoTokenizer):
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    return auto_class.from_pretrained(path.parent, gguf_file=path.name, **arguments)


def without_its_name(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("_name_or_path", "transformers_version")}


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the file was read again")


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"dtype": "auto"}, {"dtype": torch.float32}, {"dtype": "bfloat16"}, {"torch_dtype": torch.float16}],
)
def test_floats_are_those_that_transformers_makes(quantised, auto_class, arguments, monkeypatch) -> None:
    expected = read_of_the_file(auto_class, quantised, **arguments)
    for _ in range(2):
        found = model_from_gguf(auto_class, str(quantised), **arguments)
        assert type(found) is type(expected)
        assert found.dtype is expected.dtype
        assert found.state_dict().keys() == expected.state_dict().keys()
        for name, weight in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], weight), name
        assert without_its_name(found.config.to_dict()) == without_its_name(expected.config.to_dict())
        if found.can_generate():
            assert found.generation_config.to_dict() == expected.generation_config.to_dict()
        monkeypatch.setattr("ia3.gguf._read", never)


def test_arguments_change_what_is_kept_as_they_change_the_file(quantised, monkeypatch) -> None:
    arguments = {"num_labels": 5, "pad_token_id": 3}
    expected = read_of_the_file(AutoModelForSequenceClassification, quantised, **arguments)
    model_from_gguf(AutoModelForCausalLM, str(quantised))
    monkeypatch.setattr("ia3.gguf._read", never)
    found, info = model_from_gguf(
        AutoModelForSequenceClassification, str(quantised), output_loading_info=True, **arguments
    )
    assert without_its_name(found.config.to_dict()) == without_its_name(expected.config.to_dict())
    assert set(info["missing_keys"]) == {"score.weight"}
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], weight), name
    padded = model_from_gguf(AutoModelForCausalLM, str(quantised), pad_token_id=3)
    assert padded.generation_config.pad_token_id == 3


def test_tokenizer_and_configuration_are_those_of_the_file(stored, monkeypatch) -> None:
    path, _ = stored
    tokenizer, config = (read_of_the_file(auto_class, path) for auto_class in (AutoTokenizer, AutoConfig))
    for _ in range(2):
        assert _facts(from_gguf(AutoTokenizer, str(path))) == _facts(tokenizer)
        found = from_gguf(AutoConfig, str(path))
        assert without_its_name(found.to_dict()) == without_its_name(config.to_dict())
        assert from_gguf(AutoTokenizer, str(path), padding_side="left").padding_side == "left"
        monkeypatch.setattr("ia3.gguf._read", never)


def test_a_tokenizer_that_would_come_back_as_another_is_read_of_the_file(stored, monkeypatch) -> None:
    numbers = itertools.count()
    monkeypatch.setattr("ia3.gguf._facts", lambda tokenizer: next(numbers))
    for _ in range(2):
        assert from_gguf(AutoTokenizer, str(stored[0])).chat_template == CHATS
    assert next(numbers) == 2


def test_the_content_decides_which_model_it_is(stored, quantised, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(stored[0].read_bytes())
    assert model_from_gguf(AutoModelForCausalLM, str(path)).config.hidden_size == 16
    path.write_bytes(quantised.read_bytes())
    assert from_gguf(AutoConfig, str(path)).hidden_size == 32
    assert model_from_gguf(AutoModelForCausalLM, str(path)).config.hidden_size == 32
    monkeypatch.setattr("ia3.gguf._read", never)
    copy = path.rename(tmp_path / "other.GGUF")
    assert model_from_gguf(AutoModelForCausalLM, str(copy)).name_or_path == str(copy)


def test_another_version_makes_its_own(stored, monkeypatch, caplog) -> None:
    for number in ("5.0", "6.0"):
        monkeypatch.setattr("ia3.gguf.version", lambda package, number=number: number)
        model_from_gguf(AutoModelForCausalLM, str(stored[0]))
    assert caplog.text.count("Making a float32 model") == 2


def test_making_is_said_with_its_size(stored, cache: Path, caplog) -> None:
    for _ in range(2):
        model_from_gguf(AutoModelForCausalLM, str(stored[0]))
    assert caplog.messages == [
        f"Making a float32 model of {stored[0]}: this takes long, and is done once",
        f"It takes 0 MB of the cache, {cache}",
    ]


def test_a_cache_that_cannot_be_written(stored, tmp_path: Path, monkeypatch, caplog) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IA3_CACHE", str(tmp_path / "file"))
    path, model = stored
    for _ in range(2):
        assert torch.equal(model_from_gguf(AutoModelForCausalLM, str(path))(IDS).logits, model(IDS).logits)
        assert from_gguf(AutoTokenizer, str(path)).chat_template == CHATS
        assert from_gguf(AutoConfig, str(path)).hidden_size == 16
    assert caplog.text.count("cannot be written") == 1


def test_a_file_that_is_still_being_written(stored, tmp_path: Path, monkeypatch, cache: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(stored[0].read_bytes())

    def read(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        with path.open("ab") as file:
            file.write(b"more")
        return found

    real = ia3.gguf._read
    monkeypatch.setattr("ia3.gguf._read", read)
    with pytest.raises(ValueError, match=r"model.gguf changed while it was read"):
        from_gguf(AutoConfig, str(path))
    assert not [folder for folder in cache.iterdir() if folder.name != ".locks"]


def test_a_part_of_a_model_is_not_kept_as_a_whole_one(stored, tmp_path: Path) -> None:
    """What transformers draws in the place of missing weights is drawn anew each time."""
    path = write_gguf(tmp_path / "part.gguf", stored[1], without="model.layers.1.mlp.up_proj.weight")
    for _ in range(2):
        _, info = model_from_gguf(AutoModelForCausalLM, str(path), output_loading_info=True)
        assert set(info["missing_keys"]) == {"model.layers.1.mlp.up_proj.weight"}


def test_who_asks_for_another_quantisation_gets_it(stored, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("ia3.gguf._read", lambda *args, **kwargs: asked.append(kwargs) or builders.llama())
    config = GgufConfig(dequantize=True)
    model_from_gguf(AutoModelForCausalLM, str(stored[0]), quantization_config=config)
    assert asked == [{"quantization_config": config}]


@pytest.mark.parametrize("arguments", [{}, {"dtype": "auto"}])
def test_a_file_gives_model_configuration_and_tokenizer(stored, arguments: dict) -> None:
    path, model = stored
    name = str(path)
    loaded = model_from_gguf(AutoModelForCausalLM, name, **arguments)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    tokenizer = from_gguf(AutoTokenizer, name)
    assert tokenizer("BABD", add_special_tokens=False)["input_ids"] == [3, 62, 5]
    assert tokenizer.chat_template == CHATS
    config = from_gguf(AutoConfig, name)
    assert config.model_type == "llama"
    assert {loaded.name_or_path, loaded.config.name_or_path, tokenizer.name_or_path, config.name_or_path} == {name}


def test_an_adapter_finds_its_file_again(stored, tmp_path: Path) -> None:
    path, _ = stored
    model = get_peft_model(load_model(str(path), AutoModelForCausalLM), IA3Config(task_type="CAUSAL_LM"))
    builders.randomise(model)
    model.save_pretrained(tmp_path)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert again.peft_config["default"].base_model_name_or_path == str(path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(whole(IDS).logits, model(IDS).logits)


def test_a_head_on_a_file_goes_to_disk_and_back(stored, tmp_path: Path) -> None:
    path, _ = stored
    base = load_model(str(path), AutoModelForSequenceClassification, num_labels=5, pad_token_id=0)
    model = get_peft_model(base, IA3Config(task_type="SEQ_CLS"))
    assert model.modules_to_save == {"score"}
    model.save_pretrained(tmp_path)
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, pad_token_id=0)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_what_is_no_gguf_model_says_so(tmp_path: Path) -> None:
    assert is_gguf("owner/name/Model.Q4_1.GGUF")
    assert not is_gguf("owner/gguf")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*missing.gguf: check the path"):
        model_from_gguf(AutoModelForCausalLM, str(tmp_path / "missing.gguf"))
    (tmp_path / "torn.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ValueError, match=r"torn.gguf cannot be read as a GGUF model: copy or download it again"):
        model_from_gguf(AutoModelForCausalLM, str(tmp_path / "torn.gguf"))


@pytest.mark.parametrize("absent", ["gguf", "accelerate"])
def test_a_package_that_is_not_installed(stored, monkeypatch, absent) -> None:
    monkeypatch.setattr("ia3.gguf.find_spec", lambda name: None if name == absent else object())
    with pytest.raises(ImportError, match=rf"needs {absent}: pip install {absent}$"):
        from_gguf(AutoConfig, str(stored[0]))
