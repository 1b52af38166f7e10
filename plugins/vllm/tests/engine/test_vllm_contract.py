"""The names of vLLM that the plugin puts its own in the place of, and what it takes them to be like.

A new release of vLLM fails here first, by name.
"""

from __future__ import annotations

import inspect
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import ia3_vllm


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_entry_point_is_found_and_may_be_called_again():
    (point,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "ia3"]
    register = point.load()
    register()
    from vllm.lora import utils
    from vllm.v1.engine.llm_engine import LLMEngine

    classes, wrapped = utils._all_lora_classes, LLMEngine.add_request
    register()
    assert utils._all_lora_classes == classes
    assert LLMEngine.add_request is wrapped


def test_another_release_is_refused(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.320.1")
    with pytest.raises(RuntimeError, match=r"this is 0\.320\.1.*VLLM_PLUGINS"):
        ia3_vllm.register()


def test_layers_are_chosen_from_a_tuple_read_at_each_call():
    from vllm.lora import utils

    assert isinstance(utils._all_lora_classes, tuple)
    assert "_all_lora_classes" in utils.from_layer.__code__.co_names


def test_linear_layers_have_the_methods_that_are_extended():
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    assert parameters(BaseLinearLayerWithLoRA.apply) == ["self", "x", "bias"]
    assert parameters(BaseLinearLayerWithLoRA._apply_lora_to_output) == ["self", "x", "output"]
    assert parameters(BaseLinearLayerWithLoRA.set_lora) == ["self", "index", "lora_a", "lora_b"]
    assert parameters(BaseLinearLayerWithLoRA.reset_lora) == ["self", "index"]
    assert "_token_lora_indices" in inspect.getsource(PunicaWrapperBase)


def test_every_linear_layer_with_lora_multiplies_too():
    ia3_vllm.register()
    from vllm.lora import utils
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    from ia3_vllm.layers import Scaled

    linear = [kind for kind in utils._all_lora_classes if issubclass(kind, BaseLinearLayerWithLoRA)]
    assert len(linear) >= 11
    assert all(kind.__mro__[1] is Scaled for kind in linear)


def test_linear_layers_say_how_they_are_sharded():
    from vllm.model_executor.layers import linear

    source = inspect.getsource(linear)
    for name in ("total_num_heads", "total_num_kv_heads", "head_size", "v_head_size", "output_sizes", "skip_bias_add"):
        assert f"self.{name}" in source
    for name in ("tp_size", "tp_rank", "input_size", "output_size", "bias"):
        assert f"self.{name}" in source


def test_managers_have_the_methods_that_are_extended():
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LRUCacheLoRAModelManager as Manager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager as Worker
    from vllm.v1.worker import lora_model_runner_mixin as runner

    assert parameters(LoRAModel.__init__)[:4] == ["self", "lora_model_id", "rank", "loras"]
    assert parameters(Manager._create_lora_modules) == ["self"]
    assert parameters(Manager._deactivate_adapter) == ["self", "lora_id"]
    assert parameters(Manager._add_adapter) == ["self", "lora"]
    assert parameters(Manager.activate_adapter) == ["self", "lora_id"]
    assert parameters(Worker._load_adapter) == ["self", "lora_request"]
    assert Worker._manager_cls.__name__ in ("LRUCacheLoRAModelManager", "ModelManager")
    assert "LRUCacheWorkerLoRAManager" in runner.LoRAModelRunnerMixin.load_lora_model.__code__.co_names


def test_engines_have_the_methods_that_are_wrapped():
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    for engine in (AsyncLLM, LLMEngine):
        assert parameters(engine.add_lora) == ["self", "lora_request"]
        assert parameters(engine.remove_lora) == parameters(engine.pin_lora) == ["self", "lora_id"]
        assert parameters(engine.list_loras) == ["self"]
        assert "lora_request" in parameters(engine.add_request)


def test_caches_tell_adapters_apart_by_name_and_path():
    from vllm.v1.core import kv_cache_utils

    source = inspect.getsource(kv_cache_utils._gen_lora_extra_hash_keys)
    assert "lora_request.lora_name, lora_request.lora_path" in source


def test_the_documented_commands_are_vllms():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    page = (Path(__file__).parents[4] / "docs" / "serving-vllm.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^vllm serve (.*?[^\\\\])$", page, re.MULTILINE | re.DOTALL)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(shlex.split(command.replace("\\\n", " ")))
    assert parsed.enable_lora
    assert parsed.lora_target_modules == ["k_proj", "v_proj", "down_proj"]
    assert parsed.lora_modules[0].name == "news"


def layer(index, slots=2, width=4, always=True):
    """A layer's tables without an engine."""
    from ia3_vllm.layers import Scaled

    scaled = Scaled()
    scaled.tables = {
        "output": torch.cat([torch.ones(1, width), torch.arange(2.0, 2 + slots)[:, None].expand(-1, width)])
    }
    scaled.in_use = {"output": {0}}
    scaled.always = always
    scaled.punica_wrapper = type("Wrapper", (), {"_token_lora_indices": index})()
    return scaled


def test_what_the_index_says_of_padding_never_leaves_the_table():
    least, most = torch.iinfo(torch.long).min, torch.iinfo(torch.long).max
    scaled = layer(torch.tensor([0, -1, 1, least, most, 99, -7]))
    product = scaled._scaled("output", torch.ones(7, 4))
    assert torch.equal(product[:3, 0], torch.tensor([2.0, 1.0, 3.0]))
    assert torch.isfinite(product).all()


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4)])
def test_products_are_one_graph_for_any_number_of_tokens(shape):
    """What a compiled engine needs: no break in the graph, and none of its own for a number of tokens."""
    scaled = layer(torch.tensor([0, -1, 1, 1, 0, -1, 0, 1]))
    compiled = torch.compile(lambda x: scaled._scaled("output", x), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for tokens in (5, 8, 3):
            x = torch.randn(*shape[:-2], tokens, 4)
            torch._dynamo.mark_dynamic(x, len(shape) - 2)
            assert torch.equal(compiled(x), scaled._scaled("output", x))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_ranks_slices_are_where_vllm_has_its_lora_matrices(ranks):
    """B's rows lie at outputs and A's columns at inputs: vLLM's own slices of them are the oracle."""
    from types import SimpleNamespace

    from vllm.lora.layers import (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        QKVParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
    )

    from ia3_vllm.slices import even, grouped_heads, joined

    heads, key_heads, size = 8, 2, 3
    key_width = max(1, key_heads // ranks) * size
    replicas = max(1, ranks // key_heads)
    parts = [torch.randn(count * size) for count in (heads, key_heads, key_heads)]
    halves, wide = [torch.randn(8), torch.randn(8)], torch.randn(8)
    for rank in range(ranks):
        base = SimpleNamespace(num_kv_head_replicas=replicas)
        own = {"tp_rank": rank, "base_layer": base, "q_proj_shard_size": heads // ranks * size}
        own |= {"q_proj_total_size": heads * size, "kv_proj_shard_size": key_width}
        own |= {"kv_proj_total_size": key_heads * size}
        theirs = QKVParallelLinearWithLoRA.slice_lora_b(SimpleNamespace(**own), torch.cat(parts)[:, None])
        assert torch.equal(joined(parts, grouped_heads(heads, key_heads, size, size, ranks, rank)), theirs[:, 0])

        own = SimpleNamespace(n_slices=2, output_ids=(rank, rank), output_slices=(8 // ranks, 8 // ranks))
        theirs = MergedColumnParallelLinearWithLoRA.slice_lora_b(own, [half[:, None] for half in halves])
        assert torch.equal(joined(halves, (even(8, ranks, rank),) * 2), torch.cat(theirs)[:, 0])

        own = SimpleNamespace(is_merged_col_linear=False, output_size=8 // ranks, input_size=8 // ranks, tp_rank=rank)
        assert torch.equal(
            even(8, ranks, rank).of(wide), ColumnParallelLinearWithLoRA.slice_lora_b(own, wide[:, None])[:, 0]
        )
        assert torch.equal(even(8, ranks, rank).of(wide), RowParallelLinearWithLoRA.slice_lora_a(own, wide[None])[0])
