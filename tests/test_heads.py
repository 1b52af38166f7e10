"""What a checkpoint lacks: trained in full, saved and found again, by any way of loading, or said."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import ia3
from ia3 import (
    AdapterTable,
    AutoPeftModel,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    IA3Config,
    PeftModel,
    get_peft_model,
)
from tiny_heads import load_base, save_base

# What carries the vectors where the default can't tell: the last name multiplies its input.
TARGETS = {
    "deberta-v2": ("key_proj", "value_proj", "output.dense"),
    "albert": ("key", "value", "ffn_output"),
    "electra": ("key", "value", "output.dense"),
    "distilbert": ("k_lin", "v_lin", "lin2"),
    "xlnet": ("layer_1", "layer_2"),
    "whisper": ("encoder.layers.0.self_attn.k_proj", "encoder.layers.0.fc2"),
    "wav2vec2": ("k_proj", "v_proj", "output_dense"),
    "hubert": ("k_proj", "v_proj", "output_dense"),
    "vit": ("k_proj", "v_proj", "fc2"),
    "beit": ("k_proj", "v_proj", "fc2"),
    "swin": ("k_proj", "v_proj", "fc2"),
    "convnext": ("pwconv1", "pwconv2"),
    "yolos": ("key", "value", "output.dense"),
}
AUTO = {
    "SEQ_CLS": AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": AutoPeftModelForTokenClassification,
    "QUESTION_ANS": AutoPeftModelForQuestionAnswering,
    None: AutoPeftModel,
}
CLASSES = {"num_labels": 5}

# family, what was saved, what it becomes, the task, arguments of loading, what is trained in full
HEADS = [
    ("bert", "MaskedLM", "SequenceClassification", "SEQ_CLS", CLASSES, ["bert.pooler", "classifier"]),
    ("bert", "MaskedLM", "SequenceClassification", None, CLASSES, ["bert.pooler", "classifier"]),
    ("bert", "MaskedLM", "TokenClassification", "TOKEN_CLS", CLASSES, ["classifier"]),
    ("bert", "MaskedLM", "QuestionAnswering", "QUESTION_ANS", {}, ["qa_outputs"]),
    ("bert", "MaskedLM", "MultipleChoice", None, {}, ["bert.pooler", "classifier"]),
    ("bert", "MaskedLM", "NextSentencePrediction", None, {}, ["bert.pooler", "cls"]),
    ("roberta", "MaskedLM", "SequenceClassification", "SEQ_CLS", CLASSES, ["classifier"]),
    ("deberta-v2", "MaskedLM", "SequenceClassification", "SEQ_CLS", CLASSES, ["classifier", "pooler"]),
    ("albert", "MaskedLM", "SequenceClassification", "SEQ_CLS", CLASSES, ["albert.pooler", "classifier"]),
    ("electra", "", "MultipleChoice", None, {}, ["classifier", "sequence_summary"]),
    ("distilbert", "MaskedLM", "SequenceClassification", "SEQ_CLS", CLASSES, ["classifier", "pre_classifier"]),
    ("xlnet", "", "SequenceClassification", "SEQ_CLS", CLASSES, ["logits_proj", "sequence_summary"]),
    ("xlnet", "", "MultipleChoice", None, {}, ["logits_proj", "sequence_summary"]),
    ("gpt2", "CausalLM", "SequenceClassification", "SEQ_CLS", CLASSES, ["score"]),
    ("llama", "CausalLM", "TokenClassification", "TOKEN_CLS", CLASSES, ["score"]),
    ("t5", "Seq2SeqLM", "SequenceClassification", "SEQ_CLS", CLASSES, ["classification_head"]),
    ("t5", "Seq2SeqLM", "QuestionAnswering", "QUESTION_ANS", {}, ["qa_outputs"]),
    ("bart", "Seq2SeqLM", "SequenceClassification", "SEQ_CLS", CLASSES, ["classification_head"]),
    ("whisper", "SpeechSeq2Seq", "AudioClassification", None, CLASSES, ["classifier", "projector"]),
    ("wav2vec2", "PreTraining", "CTC", None, {"vocab_size": 17}, ["lm_head"]),
    ("wav2vec2", "PreTraining", "AudioFrameClassification", None, CLASSES, ["classifier"]),
    (
        *("wav2vec2", "PreTraining", "AudioXVector", None, CLASSES),
        ["classifier", "feature_extractor", "objective", "projector", "tdnn.0", "tdnn.1"],
    ),
    ("hubert", "", "AudioClassification", None, CLASSES, ["classifier", "projector"]),
    ("vit", "", "ImageClassification", None, CLASSES, ["classifier"]),
    ("beit", "", "ImageClassification", None, CLASSES, ["classifier"]),
    ("swin", "", "ImageClassification", None, CLASSES, ["classifier"]),
    ("convnext", "", "ImageClassification", None, CLASSES, ["classifier"]),
    ("yolos", "", "ObjectDetection", None, CLASSES, ["bbox_predictor", "class_labels_classifier"]),
]


def config_for(family: str, **settings: Any) -> IA3Config:
    names = TARGETS.get(family)
    where = {} if names is None else {"target_modules": list(names), "feedforward_modules": [names[-1]]}
    return IA3Config(**{**where, **settings})


def feed_for(family: str, head: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family in ("vit", "beit", "swin", "convnext", "yolos"):
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if family in ("wav2vec2", "hubert"):
        return {"input_values": torch.randn(2, 200, generator=generator)}
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=generator)}
    ids = torch.randint(3, 60, (2, 7), generator=generator)
    ids[:, -1] = 1  # the end token, which some heads look for
    return {"input_ids": torch.stack([ids, ids.flip(-1)], dim=1) if head == "MultipleChoice" else ids}


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [value for value in model.eval()(**batch).values() if isinstance(value, torch.Tensor)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """To rounding: memory that lies otherwise is summed in another order on some processors."""
    close = partial(torch.allclose, rtol=1e-5, atol=1e-6)
    return len(one) == len(other) > 0 and all(map(close, one, other))


def said(caplog: Any) -> str:
    """What ia3 told, apart from how a default differs."""
    records = [record for record in caplog.records if record.name == "ia3"]
    return "\n".join(record.getMessage() for record in records if "default" not in record.getMessage())


def train(model: Any, batch: dict[str, torch.Tensor], steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        values = [value for value in model(**batch).values() if isinstance(value, torch.Tensor)]
        sum(value.square().mean() for value in values).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("family", "saved", "head", "task", "arguments", "whole"), HEADS, ids=lambda value: str(value).replace("'", "")
)
def test_a_drawn_head_is_trained_saved_and_found_again(family, saved, head, task, arguments, whole, tmp_path):
    path = save_base(tmp_path / "base", family, saved)
    model = get_peft_model(load_base(path, head, 1, **arguments), config_for(family, task_type=task))
    assert model.peft_config["default"].modules_to_save == whole
    batch = feed_for(family, head)
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    train(model, batch)
    after = dict(model.named_parameters())
    still = [key for key, value in before.items() if torch.equal(value, after[key])]
    # X-vectors read the weights of their loss with labels alone.
    assert [key for key in still if ".modules_to_save." in key and not key.startswith("objective.")] == []
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_base(path, head, 2, **arguments), tmp_path / "adapter")
    assert same(outputs(loaded, batch), expected)
    torch.manual_seed(3)
    by_name = AUTO[task].from_pretrained(tmp_path / "adapter")
    assert same(outputs(by_name, batch), expected)
    assert not any(p.requires_grad for p in by_name.parameters())


@pytest.mark.parametrize(
    ("family", "saved", "head", "names"),
    [
        ("bert", "MaskedLM", "SequenceClassification", ["pooler"]),
        ("xlnet", "", "SequenceClassification", ["logits_proj", "sequence_summary"]),
        ("deberta-v2", "MaskedLM", "SequenceClassification", ["pooler"]),
    ],
)
def test_heads_go_to_peft_and_back(family, saved, head, names, tmp_path):
    peft = pytest.importorskip("peft")
    path = save_base(tmp_path / "base", family, saved)
    batch = feed_for(family, head)
    ours = get_peft_model(load_base(path, head, 1, **CLASSES), config_for(family, task_type="SEQ_CLS"))
    train(ours, batch)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(load_base(path, head, 2, **CLASSES), tmp_path / "ours")
    torch.testing.assert_close(outputs(theirs, batch)[0], outputs(ours, batch)[0])

    targets = list(TARGETS.get(family, ("key", "value", "output.dense")))
    config = peft.IA3Config(
        task_type="SEQ_CLS", target_modules=targets, feedforward_modules=targets[-1:], modules_to_save=names
    )
    theirs = peft.get_peft_model(load_base(path, head, 3, **CLASSES), config)
    train(theirs, batch)
    theirs.save_pretrained(tmp_path / "theirs")
    for loaded in (
        PeftModel.from_pretrained(load_base(path, head, 4, **CLASSES), tmp_path / "theirs"),
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "theirs"),
    ):
        torch.testing.assert_close(outputs(loaded, batch)[0], outputs(theirs, batch)[0])


@pytest.fixture
def without_pooler(tmp_path):
    """A BERT without a pooler, and an adapter that holds its head alone."""
    path = save_base(tmp_path / "base", "bert", "MaskedLM")
    model = get_peft_model(load_base(path, "SequenceClassification", 1), IA3Config(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rest = {key: tensor for key, tensor in tensors.items() if "pooler" not in key}
    assert len(rest) < len(tensors)
    save_file(rest, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = IA3Config.from_pretrained(tmp_path / "adapter")
    config.modules_to_save = ["classifier"]
    config.save_pretrained(tmp_path / "adapter")
    return path, tmp_path / "adapter"


def test_an_adapter_without_what_its_base_has_drawn_is_refused(without_pooler, tmp_path, trace):
    path, adapter = without_pooler
    base = load_base(path, "SequenceClassification", 2)
    before = trace(base.eval())
    wrong = r"lacks 1 tensors that the adapter doesn't bring.*\(bert\.pooler\.dense\.weight\).*exclude_modules"
    with pytest.raises(ValueError, match=wrong):
        PeftModel.from_pretrained(base, adapter)
    assert before.differences(trace(base)) == []
    with pytest.raises(ValueError, match=wrong):
        AutoPeftModelForSequenceClassification.from_pretrained(adapter)
    model = get_peft_model(base, IA3Config(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=wrong):
        model.load_adapter(adapter, "other")
    assert list(model.peft_config) == ["default"]


def test_a_base_that_holds_everything_takes_an_adapter_without_it(without_pooler, tmp_path):
    path, adapter = without_pooler
    load_base(path, "SequenceClassification", 2).save_pretrained(tmp_path / "whole")
    PeftModel.from_pretrained(load_base(str(tmp_path / "whole"), "SequenceClassification", 3), adapter)


def test_a_table_refuses_vectors_alone_for_a_drawn_head(tmp_path):
    path = save_base(tmp_path / "base", "bert", "MaskedLM")
    bare = get_peft_model(load_base(path, "MaskedLM", 1), IA3Config())
    bare.save_pretrained(tmp_path / "adapter")
    table = AdapterTable(load_base(path, "MultipleChoice", 2))
    with pytest.raises(ValueError, match=r"lacks 2 tensors .*bert\.pooler\.dense\.weight, classifier\.weight"):
        table.register("a", tmp_path / "adapter")


@pytest.mark.parametrize("excluded", [["pooler"], r".*pooler.*"], ids=["name", "pattern"])
def test_exclude_modules_leaves_a_drawn_part_alone(excluded, tmp_path, caplog):
    path = save_base(tmp_path / "base", "bert", "MaskedLM")
    config = IA3Config(task_type="SEQ_CLS", exclude_modules=excluded)
    model = get_peft_model(load_base(path, "SequenceClassification", 1), config)
    assert model.modules_to_save == {"classifier"}
    assert "pooler" not in said(caplog)
    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(load_base(path, "SequenceClassification", 2), tmp_path / "adapter")


def test_the_head_that_peft_trains_is_trained_though_it_is_excluded(tiny):
    model = get_peft_model(tiny("bert"), IA3Config(task_type="SEQ_CLS", exclude_modules=["classifier"]))
    assert model.modules_to_save == {"classifier"}


def test_what_is_trained_unasked_is_said_once_it_is_attached(tmp_path, caplog):
    path = save_base(tmp_path / "base", "bert", "MaskedLM")
    base = load_base(path, "MultipleChoice", 1)
    with pytest.raises(ValueError, match="matches no module"):
        get_peft_model(base, IA3Config(target_modules=["nothing"]))
    assert said(caplog) == ""
    get_peft_model(base, IA3Config())
    assert "Trained in full and saved beside the vectors: bert.pooler, classifier," in said(caplog)


@pytest.mark.parametrize(
    ("family", "head"),
    [("t5", "Seq2SeqLM"), ("bart", "Seq2SeqLM"), ("gpt2", "CausalLM"), ("llama", "CausalLM"), ("bert", "MaskedLM")],
)
@pytest.mark.parametrize("resized", [False, True], ids=["as saved", "resized"])
def test_a_language_model_gets_no_head(family, head, resized, tmp_path, caplog):
    path = save_base(tmp_path / "base", family, head)
    base = load_base(path, head, 1)
    if resized:
        base.resize_token_embeddings(70)
    task = {"Seq2SeqLM": "SEQ_2_SEQ_LM", "CausalLM": "CAUSAL_LM", "MaskedLM": None}[head]
    model = get_peft_model(base, IA3Config(task_type=task))
    assert model.modules_to_save is None
    assert "checkpoint lacks" not in said(caplog)
    model.save_pretrained(tmp_path / "adapter")
    again = load_base(path, head, 2)
    if resized:
        again.resize_token_embeddings(70)
    PeftModel.from_pretrained(again, tmp_path / "adapter")


def test_a_drawn_output_layer_is_said_and_refused(tmp_path, caplog):
    path = save_base(tmp_path / "base", "llama", "")
    model = get_peft_model(load_base(path, "CausalLM", 1), IA3Config(task_type="CAUSAL_LM"))
    assert model.modules_to_save is None
    assert "The checkpoint lacks lm_head.weight of this LlamaForCausalLM" in said(caplog)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*\(lm_head\.weight\)"):
        PeftModel.from_pretrained(load_base(path, "CausalLM", 2), tmp_path / "adapter")


def test_a_head_of_another_size_was_drawn(tmp_path):
    path = save_base(tmp_path / "base", "roberta", "SequenceClassification")
    larger = {"num_labels": 7, "ignore_mismatched_sizes": True}
    model = get_peft_model(load_base(path, "SequenceClassification", 1, **larger), IA3Config())
    assert model.modules_to_save == {"classifier.out_proj"}
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert loaded.config.num_labels == 7
    batch = feed_for("roberta", "")
    assert same(outputs(loaded, batch), outputs(model, batch))


def test_a_saved_head_stays_frozen_where_no_task_is_named(tmp_path):
    path = save_base(tmp_path / "base", "vit", "ImageClassification")
    model = get_peft_model(load_base(path, "ImageClassification", 1), config_for("vit"))
    assert model.modules_to_save is None


def test_a_saved_head_is_trained_for_its_task(tmp_path):
    path = save_base(tmp_path / "base", "xlnet", "SequenceClassification")
    config = config_for("xlnet", task_type="SEQ_CLS")
    model = get_peft_model(load_base(path, "SequenceClassification", 1), config)
    assert model.modules_to_save == {"logits_proj", "sequence_summary"}


def test_a_module_inside_that_the_user_named_stays_one_of_its_own(tmp_path):
    path = save_base(tmp_path / "base", "roberta", "MaskedLM")
    base = load_base(path, "SequenceClassification", 1)
    model = get_peft_model(base, IA3Config(modules_to_save=["classifier.out_proj"]))
    assert model.modules_to_save == {"classifier.out_proj", "classifier.dense"}


def test_parameters_in_no_module_of_their_own_are_said(tmp_path, caplog):
    path = save_base(tmp_path / "base", "whisper", "SpeechSeq2Seq")
    model = get_peft_model(load_base(path, "AudioClassification", 1), config_for("whisper"))
    assert "The checkpoint lacks layer_weights of this WhisperForAudioClassification" in said(caplog)
    model.save_pretrained(tmp_path / "adapter")
    caplog.clear()
    base = load_base(path, "AudioClassification", 2)
    PeftModel.from_pretrained(base, tmp_path / "adapter").unload()
    assert said(caplog) == ""  # all of them are drawn alike
    nn.init.normal_(base.layer_weights)
    PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert "lacks layer_weights, newly drawn with each loading" in said(caplog)


def test_layers_of_the_base_are_said_and_refused(tmp_path, caplog):
    path = save_base(tmp_path / "base", "bert", "SequenceClassification")
    model = get_peft_model(load_base(path, "SequenceClassification", 1, num_hidden_layers=3), IA3Config())
    assert model.modules_to_save is None
    assert "lacks bert.encoder.layer.2.attention.self.query.weight" in said(caplog)
    assert "and 12 more of this Bert" in said(caplog)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"lacks 6 tensors .*bert\.encoder\.layer\.2"):
        PeftModel.from_pretrained(
            load_base(path, "SequenceClassification", 2, num_hidden_layers=3), tmp_path / "adapter"
        )


def test_a_model_without_a_head_keeps_its_drawn_pooler_and_says_so(tmp_path, caplog):
    path = save_base(tmp_path / "base", "roberta", "MaskedLM")
    config = IA3Config(task_type="FEATURE_EXTRACTION")
    model = get_peft_model(load_base(path, "", 1), config)
    assert model.modules_to_save is None
    assert "The checkpoint lacks pooler.dense.weight, pooler.dense.bias of this RobertaModel" in said(caplog)
    model.save_pretrained(tmp_path / "adapter")
    caplog.clear()
    loaded = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter")
    assert "lacks pooler.dense.weight, newly drawn with each loading" in said(caplog)
    batch = feed_for("roberta", "")
    assert torch.equal(outputs(loaded, batch)[0], outputs(model, batch)[0])
    named = get_peft_model(load_base(path, "", 1), IA3Config(modules_to_save=["pooler"]))
    named.save_pretrained(tmp_path / "adapter")
    assert same(outputs(AutoPeftModel.from_pretrained(tmp_path / "adapter"), batch), outputs(named, batch))


def test_a_module_around_a_base_is_left_to_its_owner(tmp_path, caplog):
    path = save_base(tmp_path / "base", "bert", "SequenceClassification")

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = load_base(path, "", 1), nn.Sequential(nn.Linear(16, 2))

    config = IA3Config(target_modules=["key", "value"], feedforward_modules=[])
    model = get_peft_model(Around(), config)
    assert model.modules_to_save is None
    assert "The checkpoint lacks head.0.weight, head.0.bias of this Around" in said(caplog)
    model.save_pretrained(tmp_path / "adapter")
    caplog.clear()
    PeftModel.from_pretrained(Around(), tmp_path / "adapter")
    assert "lacks head.0.weight" in said(caplog)


def test_a_head_put_in_the_place_of_another_is_trained(tmp_path):
    path = save_base(tmp_path / "base", "vit", "ImageClassification")
    base = load_base(path, "ImageClassification", 1)
    base.classifier = nn.Linear(16, 9)
    assert get_peft_model(base, config_for("vit")).modules_to_save == {"classifier"}


def test_modules_of_a_list_are_trained_one_by_one(tmp_path):
    backbone = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], out_features=["stage2"])
    config = transformers.DeformableDetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=3,
        num_feature_levels=1,
        with_box_refine=True,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
    )
    transformers.DeformableDetrForObjectDetection(config).save_pretrained(tmp_path)
    base = transformers.DeformableDetrForObjectDetection.from_pretrained(
        tmp_path, num_labels=4, ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, IA3Config(target_modules=["fc2"], feedforward_modules=["fc2"]))
    ends = [name.rsplit("class_embed.", 1) for name in sorted(model.modules_to_save)]
    assert len(ends) >= 2
    assert all(len(end) == 2 and end[1].isdigit() for end in ends)


@pytest.mark.parametrize("how", ["from a configuration", "a deep copy"])
def test_of_a_model_without_a_trace_only_the_head_is_trained(how, tiny, tmp_path, caplog):
    base = tiny("bert")
    if how == "a deep copy":
        path = save_base(tmp_path / "base", "bert", "MaskedLM")
        base = copy.deepcopy(load_base(path, "SequenceClassification", 1))
    model = get_peft_model(base, IA3Config(task_type="SEQ_CLS"))
    assert model.modules_to_save == {"classifier"}
    assert "checkpoint lacks" not in said(caplog)
    get_peft_model(tiny("bert"), IA3Config())


def test_what_is_offloaded_is_not_taken_for_drawn(tmp_path, caplog):
    pytest.importorskip("accelerate")
    path = save_base(tmp_path / "base", "bert", "MaskedLM")
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    offloaded = {"device_map": places, "offload_folder": str(tmp_path / "offloaded")}
    base = load_base(path, "SequenceClassification", 1, **offloaded)
    assert base.bert.encoder.layer[0].output.dense.weight.is_meta
    model = get_peft_model(base, IA3Config(task_type="SEQ_CLS"))
    assert model.modules_to_save == {"bert.pooler", "classifier"}
    assert "The checkpoint lacks" not in said(caplog)


@pytest.mark.parametrize("moved", ["dtype", "pickled"])
def test_the_trace_survives(moved, tmp_path):
    path = save_base(tmp_path / "base", "bert", "MaskedLM")
    base = load_base(path, "SequenceClassification", 1)
    if moved == "dtype":
        base = base.to(torch.bfloat16)
    else:
        torch.save(base, tmp_path / "model.pt")
        base = torch.load(tmp_path / "model.pt", weights_only=False)
    model = get_peft_model(base, IA3Config(task_type="SEQ_CLS"))
    assert model.modules_to_save == {"bert.pooler", "classifier"}


def test_each_adapter_of_a_model_has_the_head(tmp_path):
    path = save_base(tmp_path / "base", "bert", "MaskedLM")
    model = get_peft_model(load_base(path, "SequenceClassification", 1), IA3Config(task_type="SEQ_CLS"))
    model.add_adapter("other", IA3Config(task_type="SEQ_CLS"))
    assert model.peft_config["other"].modules_to_save == ["bert.pooler", "classifier"]
    model.unload()
    again = ia3.get_peft_model(model, IA3Config(task_type="SEQ_CLS"))
    assert again.modules_to_save == {"bert.pooler", "classifier"}
