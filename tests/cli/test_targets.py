from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import call, message, succeed
from transformers import AutoConfig

import tiny_seq2seq
from ia3 import IA3Config, find_sites
from ia3.cli.names import module_names


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """The base's configuration alone."""
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    return tmp_path


def test_the_sites_of_a_model_without_weights(folder: Path) -> None:
    content = json.loads(succeed("targets", folder, "--json").stdout)
    layout = find_sites(tiny_seq2seq.base(), IA3Config()).layout
    assert [(each["path"], each["side"], tuple(each["shape"])) for each in content["sites"]] == [
        (site.path, site.side, site.shape) for site in layout.sites
    ]
    assert content["trained_numbers"] == layout.size
    assert content["target_modules"] == ["k", "v", "wo"]


def test_the_tree_folds_blocks_that_are_alike(folder: Path) -> None:
    shown = succeed("targets", folder).stdout
    assert "0–1.layer  2 alike" in shown
    assert "1.DenseReluDense.wo  input  64" in shown
    assert "16 vectors, 640 trained numbers" in shown
    assert "target modules: k, v, wo" in shown


def test_chosen_modules(folder: Path) -> None:
    shown = succeed(
        *("targets", folder, "--target-modules", "q,wo", "--feedforward-modules", "wo"),
        *("--exclude-modules", ".*decoder.*"),
    ).stdout
    assert "0.SelfAttention.q  output  32" in shown
    assert "decoder" not in shown
    pattern = succeed("targets", folder, "--target-modules", r".*encoder.*\.k", "--json")
    assert len(json.loads(pattern.stdout)["sites"]) == 2


def test_the_decoder_alone(folder: Path) -> None:
    shown = json.loads(succeed("targets", folder, "--towers", "decoder", "--json").stdout)
    assert len(shown["sites"]) == 10
    assert {each["path"].partition(".")[0] for each in shown["sites"]} == {"decoder"}


def test_a_fused_projection_says_how_much_is_trained(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2", n_embd=16, n_layer=2, n_head=4, vocab_size=11).save_pretrained(tmp_path)
    shown = succeed("targets", tmp_path).stdout
    assert "c_attn  output  32 of 48" in shown


def test_sites_that_a_forward_confirms(folder: Path) -> None:
    shown = succeed("targets", folder, "--check").stdout
    assert "checked by one forward of a tiny twin: one vector on keys, values and" in shown
    assert "6 attentions and 4 feed-forwards" in shown
    content = json.loads(succeed("targets", folder, "--check", "--json").stdout)
    assert content["check"]["differences"] == []
    assert content["check"]["class"] == type(tiny_seq2seq.base()).__name__
    assert "check" not in json.loads(succeed("targets", folder, "--json").stdout)


def test_sites_that_a_forward_denies(folder: Path) -> None:
    chosen = ("--target-modules", "q,v,wo", "--feedforward-modules", "wo")
    result = call("targets", folder, "--check", *chosen)
    assert result.exit_code == 1
    assert "one forward of a tiny twin says otherwise" in result.stdout
    assert "encoder.block.1.layer.0.SelfAttention.q scales queries" in result.stdout
    content = call("targets", folder, "--check", "--json", *chosen)
    assert content.exit_code == 1
    assert any(
        said.startswith("The keys of decoder.block.0.layer.1.EncDecAttention lack a vector")
        for said in json.loads(content.stdout)["check"]["differences"]
    )


def test_a_check_of_layers_that_a_twin_lacks(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2", n_embd=16, n_layer=6, n_head=4, vocab_size=11).save_pretrained(tmp_path)
    result = call("targets", tmp_path, "--check", "--target-modules", r".*h\.5\.attn\.c_attn")
    assert result.exit_code == 2
    assert "--check looks at a tiny" in message(result)
    assert "without their layers' numbers" in message(result)


def test_a_name_that_matches_nothing(folder: Path) -> None:
    result = call("targets", folder, "--target-modules", "keys")
    assert result.exit_code == 2
    assert "target_modules: 'keys' matches no module" in message(result)


def test_no_model(tmp_path: Path) -> None:
    result = call("targets", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "The configuration of the base model" in message(result)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(None, None), ("all-linear", "all-linear"), ("k, v,wo", ["k", "v", "wo"]), (r".*\.k", r".*\.k")],
)
def test_names(typed: str | None, meant: list[str] | str | None) -> None:
    assert module_names(typed) == meant


def test_an_empty_name() -> None:
    with pytest.raises(ValueError, match="'k,,v' has an empty name"):
        module_names("k,,v")
