"""Names that an import line asks for: PEFT's are here, or their import says why not."""

import importlib
import json
import re
from pathlib import Path

import peft
import peft.utils
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter as theirs
from torch import nn

import ia3
import ia3.utils
from ia3 import IA3Config, PeftConfig, get_peft_model
from ia3.utils.hotswap import hotswap_adapter

ROOT = Path(__file__).parents[1]
# Modules of PEFT's package, which are no names to import.
_MODULES = {
    "auto",
    "config",
    "helpers",
    "import_utils",
    "mapping",
    "mapping_func",
    "mixed_model",
    "peft_model",
    "utils",
}


def test_every_name_of_peft_is_here_or_says_why():
    for name in {name for name in dir(peft) if not name.startswith("_")} - _MODULES - set(ia3.__all__):
        with pytest.raises(ImportError, match=rf"{name} belongs to (another method|the wrapper)"):
            exec(f"from ia3 import {name}")


def test_what_is_said_to_be_elsewhere_is_in_peft():
    from ia3.elsewhere import _OF_OTHER_METHODS, _OF_THE_WRAPPER

    known = {*dir(peft), *dir(peft.utils), "tuners"}
    assert known >= _OF_THE_WRAPPER
    assert known >= _OF_OTHER_METHODS


@pytest.mark.parametrize("name", ia3.utils.__all__)
def test_the_names_of_utils_are_those_of_peft(name):
    assert hasattr(peft.utils, name)
    assert getattr(ia3.utils, name) is not None


def test_utils_says_what_it_has_not():
    with pytest.raises(ImportError, match="ModulesToSaveWrapper belongs to the wrapper"):
        importlib.import_module("ia3.utils").ModulesToSaveWrapper  # noqa: B018 (the access is what fails)
    with pytest.raises(AttributeError, match=r"'ia3.utils' has no attribute 'somethin'"):
        ia3.utils.somethin  # noqa: B018 (the access is what fails)


def test_the_mappings_are_pefts():
    assert {"IA3": IA3Config} == ia3.PEFT_TYPE_TO_CONFIG_MAPPING
    assert ia3.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.keys() == {str(task.value) for task in peft.TaskType}
    for name in ("TARGET", "FEEDFORWARD"):
        whole = f"TRANSFORMERS_MODELS_TO_IA3_{name}_MODULES_MAPPING"
        assert getattr(ia3, whole) == getattr(peft.utils, whole)


def test_what_a_configuration_answers():
    fields = {"peft_type": "IA3", "target_modules": ["k"], "feedforward_modules": []}
    for config in (ia3.get_peft_config(fields), PeftConfig.from_peft_type(**fields), IA3Config(**fields)):
        assert isinstance(config, IA3Config)
        assert not config.is_prompt_learning
        assert not config.is_adaption_prompt
        assert config.peft_version == peft.__version__
    assert IA3Config.check_kwargs(**fields) == fields
    with pytest.raises(ValueError, match="'LORA' adapter"):
        ia3.get_peft_config({"peft_type": "LORA"})


def test_a_configuration_that_matches_nothing_is_pefts_error(tiny):
    with pytest.raises(ia3.NoMatchingPeftModuleError):
        get_peft_model(tiny("t5"), IA3Config(target_modules=["nothing"], feedforward_modules=[]))
    assert issubclass(ia3.NoMatchingPeftModuleError, ValueError)
    assert issubclass(ia3.NoMatchingPeftModuleError, ia3.PeftError)


def test_labels_become_a_decoders_inputs():
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    expected = peft.utils.shift_tokens_right(labels, 1, 2)
    assert torch.equal(ia3.shift_tokens_right(labels, 1, 2), expected)
    with pytest.raises(ValueError, match="pad_token_id"):
        ia3.shift_tokens_right(labels, None, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_preparing_a_model_is_pefts(tiny, dtype):
    ours = ia3.prepare_model_for_kbit_training(tiny("t5", dtype=dtype))
    theirs = peft.prepare_model_for_kbit_training(tiny("t5", dtype=dtype))
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert one.dtype == other.dtype == torch.float32, name
        assert not one.requires_grad
    assert ia3.infer_device() == peft.utils.infer_device()


def test_preparing_a_quantised_model_computes_its_layers_again(tiny):
    model = tiny("llama")
    model.is_loaded_in_8bit = True
    ia3.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.is_gradient_checkpointing
    assert model.get_input_embeddings()(torch.tensor([[3]])).requires_grad
    other = tiny("llama")
    other.quantization_method = "gptq"
    ia3.prepare_model_for_kbit_training(other.half(), use_gradient_checkpointing=False)
    assert not other.is_gradient_checkpointing
    assert {p.dtype for p in other.parameters()} == {torch.float16}


def test_mixed_precision_casts_by_what_trains(tiny):
    model = get_peft_model(tiny("t5"), IA3Config(task_type="SEQ_2_SEQ_LM"))
    ia3.cast_mixed_precision_params(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".ia3_l." in name else torch.bfloat16)


def test_reentrant_checkpointing_reaches_the_vectors(tiny, feed):
    model = get_peft_model(tiny("llama"), IA3Config())
    batch = feed(model)

    def gradients():
        model.zero_grad()
        model(**batch).logits.pow(2).sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    model.train()
    expected = gradients()
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_hotswapping_keeps_every_tensor_and_takes_the_files_values(tiny, randomise, output, tmp_path):
    other = randomise(get_peft_model(tiny("t5"), IA3Config()), seed=7)
    other.save_pretrained(tmp_path / "other")
    model = randomise(get_peft_model(tiny("t5"), IA3Config()))
    before = dict(model.named_parameters())
    hotswap_adapter(model, tmp_path / "other", "default")
    assert torch.equal(output(model), output(other))
    assert all(before[name] is p for name, p in model.named_parameters())
    assert theirs.__name__ == hotswap_adapter.__name__


def test_hotswapping_other_sites_changes_nothing(tiny, randomise, output, tmp_path):
    get_peft_model(tiny("t5"), IA3Config(target_modules=["k"], feedforward_modules=[])).save_pretrained(tmp_path / "k")
    model = randomise(get_peft_model(tiny("t5"), IA3Config()))
    expected = output(model)
    with pytest.raises(ValueError, match="missing"):
        hotswap_adapter(model, tmp_path / "k", "default")
    with pytest.raises(ValueError, match="no adapter 'other'"):
        hotswap_adapter(model, tmp_path / "k", "other")
    assert torch.equal(output(model), expected)


def test_a_layers_vectors_by_name_as_in_peft():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), IA3Config(target_modules=["0"], feedforward_modules=[]))
    vectors = model[0].ia3_l
    assert "default" in vectors
    assert vectors["default"] is vectors.default
    assert vectors.keys() == ["default"]


def test_the_base_models_tensors_come_and_go_under_its_own_names(tiny, randomise, output):
    base = tiny("t5")
    names = base.state_dict().keys()
    model = randomise(get_peft_model(base, IA3Config(task_type="SEQ_2_SEQ_LM", modules_to_save=["lm_head"])))
    tensors = {name: tensor.clone() for name, tensor in ia3.get_base_model_state_dict(model).items()}
    assert tensors.keys() == names
    expected = output(model)
    vectors = {name: p.clone() for name, p in model.named_parameters() if ".ia3_l." in name}
    result = ia3.set_base_model_state_dict(model, {name: 0 * tensor for name, tensor in tensors.items()})
    assert result == ([], [])
    assert not torch.equal(output(model), expected)
    ia3.set_base_model_state_dict(model, tensors)
    assert torch.equal(output(model), expected)
    assert all(torch.equal(p, vectors[name]) for name, p in model.named_parameters() if name in vectors)


def test_tensors_that_do_not_fit_the_base_are_refused(tiny):
    model = get_peft_model(tiny("t5"), IA3Config())
    tensors = ia3.get_base_model_state_dict(model)
    first = next(iter(tensors))
    tensors["strange"] = tensors.pop(first)
    with pytest.raises(RuntimeError, match=rf"1 are missing.*{first}.*1 unknown \['strange'\]"):
        ia3.set_base_model_state_dict(model, tensors)
    assert ia3.set_base_model_state_dict(model, tensors, strict=False) == ([first], ["strange"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged"):
        ia3.set_base_model_state_dict(model, tensors, strict=False)


def test_the_table_of_capabilities_is_what_was_probed():
    rows = json.loads((ROOT / "benchmarks" / "results" / "capabilities.json").read_text())["rows"]
    page = (ROOT / "docs" / "from-peft.md").read_text()
    for row, found in rows.items():
        assert f"| {row} | {found['peft']} | {found['ia3']} |" in page
        assert found["ia3"] == "yes", row
    probes = re.findall(r'^@probe\("(.*)"\)$', (ROOT / "benchmarks" / "capabilities.py").read_text(), re.MULTILINE)
    assert [row for row in rows if row in probes] == probes


def test_the_count_of_pefts_own_tests_is_measured():
    total = json.loads((ROOT / "benchmarks" / "results" / "peft_own_tests.json").read_text())["total"]
    said = f"{total['passed']:,} of {total['passed'] + total['failed']:,} pass"
    assert said in (ROOT / "docs" / "from-peft.md").read_text()
    assert total["passed"] >= 1450
