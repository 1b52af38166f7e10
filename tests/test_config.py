"""The configuration: PEFT's fields, PEFT's JSON, and what is refused."""

import dataclasses
import json

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ia3 import IA3Config, PeftConfig, PeftType, TaskType
from ia3.config import CONFIG_NAME

names = st.sets(st.sampled_from(["k", "v", "wo", "wi_1", "q_proj", "mlp.c_proj"]), min_size=1)


@st.composite
def configs(draw) -> IA3Config:
    targets = draw(st.one_of(names, st.just(r".*\.(k|v)"), st.just("all-linear"), st.none()))
    if isinstance(targets, set):
        feedforward = draw(st.one_of(st.none(), st.sets(st.sampled_from(sorted(targets)))))
    else:
        feedforward = draw(st.one_of(st.none(), names, st.just(r".*\.wo")))
    return IA3Config(
        task_type=draw(st.one_of(st.none(), st.sampled_from(list(TaskType)))),
        base_model_name_or_path=draw(st.one_of(st.none(), st.text(max_size=8))),
        revision=draw(st.one_of(st.none(), st.just("main"))),
        inference_mode=draw(st.booleans()),
        target_modules=targets,
        exclude_modules=draw(st.one_of(st.none(), names, st.just(".*x"))),
        feedforward_modules=feedforward,
        fan_in_fan_out=draw(st.booleans()),
        modules_to_save=draw(st.one_of(st.none(), st.just(["classifier", "b"]))),
        init_ia3_weights=draw(st.booleans()),
    )


def _comparable(config) -> dict:
    content = {key: value for key, value in config.to_dict().items() if key not in ("peft_version", "auto_mapping")}
    return {key: sorted(value) if isinstance(value, set | list) else value for key, value in content.items()}


@given(config=configs())
def test_round_trip(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    read = IA3Config.from_pretrained(folder)
    assert _comparable(read) == _comparable(config)
    assert type(read.target_modules) is type(config.target_modules)
    again = folder / "again"
    read.save_pretrained(again)
    assert (again / CONFIG_NAME).read_bytes() == (folder / CONFIG_NAME).read_bytes()


@given(config=configs())
def test_peft_reads_ours_and_we_read_pefts(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder / "ours")
    theirs = peft.PeftConfig.from_pretrained(folder / "ours")
    assert type(theirs) is peft.IA3Config
    assert _comparable(theirs) == _comparable(config)
    theirs.save_pretrained(str(folder / "theirs"))
    ours = PeftConfig.from_pretrained(folder / "theirs")
    assert type(ours) is IA3Config
    assert _comparable(ours) == _comparable(config)
    assert ours.peft_version == theirs.peft_version


def test_same_keys_as_peft(tmp_path):
    IA3Config().save_pretrained(tmp_path / "ours")
    peft.IA3Config().save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (json.loads((tmp_path / name / CONFIG_NAME).read_text()) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert (ours["peft_type"], ours["peft_version"]) == ("IA3", peft.__version__)


def test_json_is_sorted_and_lists_too(tmp_path):
    IA3Config(target_modules=["v", "k"], modules_to_save=["z", "a"]).save_pretrained(tmp_path)
    text = (tmp_path / CONFIG_NAME).read_text()
    content = json.loads(text)
    assert list(content) == sorted(content)
    assert content["target_modules"] == ["k", "v"]
    assert content["modules_to_save"] == ["a", "z"]
    assert text.endswith("}\n")


def test_auto_mapping_is_written_where_given(tmp_path):
    IA3Config().save_pretrained(tmp_path, {"base_model_class": "A", "parent_library": "b"})
    assert PeftConfig.from_pretrained(tmp_path).auto_mapping == {"base_model_class": "A", "parent_library": "b"}


def test_type_is_ia3_and_lists_become_sets():
    config = IA3Config(target_modules=("k", "wo"), feedforward_modules=["wo"], exclude_modules=["x"])
    assert config.peft_type is PeftType.IA3
    assert (config.target_modules, config.feedforward_modules, config.exclude_modules) == ({"k", "wo"}, {"wo"}, {"x"})


def test_task_type_is_a_name_or_a_member():
    assert IA3Config(task_type="CAUSAL_LM").task_type == TaskType.CAUSAL_LM
    with pytest.raises(ValueError, match=r"'LM'.*SEQ_CLS, SEQ_2_SEQ_LM"):
        IA3Config(task_type="LM")


@pytest.mark.parametrize("empty", [[], set(), "", ()])
def test_empty_targets_are_refused(empty):
    with pytest.raises(ValueError, match="target_modules is empty"):
        IA3Config(target_modules=empty)


def test_feedforward_outside_the_targets_is_refused():
    with pytest.raises(ValueError, match=r"feedforward_modules \['wo'\] are not among target_modules \['k', 'v'\]"):
        IA3Config(target_modules=["k", "v"], feedforward_modules=["wo"])


@pytest.mark.parametrize("method", ["LORA", "PREFIX_TUNING", None, "ia3"])
def test_another_method_is_refused(tmp_path, method):
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": method, "r": 8}))
    with pytest.raises(ValueError, match=rf"{method!r} adapter.*ia3 reads IA3.*peft"):
        PeftConfig.from_pretrained(tmp_path)


def _write_ia3(folder, **more):
    (folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "IA3", "target_modules": ["k"], **more}))


def test_unknown_field_that_says_something_is_refused(tmp_path):
    _write_ia3(tmp_path, block_pattern=[1, 2])
    with pytest.raises(ValueError, match=r"block_pattern.*\[1, 2\].*Upgrade ia3"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_field_that_says_nothing_is_dropped(tmp_path, value):
    _write_ia3(tmp_path, layers_to_transform=value)
    assert PeftConfig.from_pretrained(tmp_path).target_modules == {"k"}


@pytest.mark.parametrize("value", [True, 0, 0.0, 1, 0.5, "x", [None], {"a": None}])
def test_unknown_field_with_any_value_is_refused(tmp_path, value):
    _write_ia3(tmp_path, strange=value)
    with pytest.raises(ValueError, match="strange"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}", b'{"a": 1,}'])
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{CONFIG_NAME} is not valid JSON"):
        PeftConfig.from_pretrained(tmp_path)


def test_json_that_is_no_object_is_named(tmp_path):
    (tmp_path / CONFIG_NAME).write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not a JSON object"):
        PeftConfig.from_pretrained(tmp_path)


def test_missing_file_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"No {CONFIG_NAME} in .*{tmp_path.name}"):
        PeftConfig.from_pretrained(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(FileNotFoundError, match="/sub: expected an adapter"):
        PeftConfig.from_pretrained(tmp_path, subfolder="sub")


def test_subfolder(tmp_path):
    IA3Config(target_modules=["k"]).save_pretrained(tmp_path / "other")
    assert PeftConfig.from_pretrained(tmp_path, subfolder="other").target_modules == {"k"}


def test_saving_over_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    with pytest.raises(NotADirectoryError, match="is a file"):
        IA3Config().save_pretrained(path)
    assert path.read_text() == "kept"


def test_positional_arguments_are_pefts():
    names = [field.name for field in dataclasses.fields(peft.IA3Config)]
    own = ["layers_to_transform", "layers_pattern", "towers"]
    assert [field.name for field in dataclasses.fields(IA3Config)] == [*names, *own]
    assert IA3Config("CAUSAL_LM").task_type == "CAUSAL_LM"


@pytest.mark.parametrize("written", ["all-linear", "All-Linear", "ALL-LINEAR"])
def test_all_linear_stands_alone_and_in_any_case(written: str) -> None:
    assert IA3Config(target_modules=written).target_modules == "all-linear"
    with pytest.raises(ValueError, match="all-linear is no module's name and stands alone"):
        IA3Config(target_modules=[written, "q"])
