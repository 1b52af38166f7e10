from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import builders
from ia3 import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, IA3Config, get_peft_model
from ia3.bundled import load_model
from ia3.gguf import from_gguf, is_gguf, model_from_gguf

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


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A tiny Llama with a byte tokenizer as a GGUF file, and the model itself."""
    path, model = tmp_path_factory.mktemp("gguf") / "tiny.gguf", builders.llama()
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
        writer.add_tensor(gguf_name(name), as_stored(name, weight, heads).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


IDS = torch.tensor([[5, 9, 33, 2, 60]])


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
