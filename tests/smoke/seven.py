"""Seven things with whatever torch and transformers are installed: attach, train, save, load, merge, mix, generate.

`make test-matrix` runs it in environments of the oldest and newest versions that are promised; it needs nothing but the
package's own dependencies. It prints the versions, and ends with an error at the first thing that doesn't hold.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import ia3
from ia3 import IA3Config, PeftModel, get_peft_model

IDS = torch.arange(3, 15).view(2, 6)


def llama() -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, pad_token_id=0, **shape))


def t5() -> Any:
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **shape))


def bert() -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=64, **shape))


def base(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def outputs(model: Any, batch: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**batch, **kwargs).logits
    return logits


def loss_of(model: Any, batch: dict[str, Any]) -> float:
    with torch.no_grad():
        return float(model(**batch).loss)


def check(what: str, holds: bool) -> None:
    if not holds:
        raise SystemExit(f"{what} doesn't hold with {versions()}.")


def versions() -> str:
    return f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def run(make: Callable[[], Any], task: str, batch: dict[str, Any]) -> None:
    name = make.__name__
    before, loss_before = outputs(base(make), batch), loss_of(base(make), batch)

    model = get_peft_model(base(make), IA3Config(task_type=task))
    check(f"{name}: attaching changes nothing", torch.equal(outputs(model, batch), before))

    vectors = [parameter for path, parameter in model.named_parameters() if ".ia3_l." in path]
    optimizer = torch.optim.AdamW(vectors, lr=0.05, weight_decay=0.0)
    model.train()(**batch).loss.backward()
    check(f"{name}: every vector has a gradient", all(vector.grad is not None for vector in vectors))
    optimizer.step()
    model.eval()
    after = outputs(model, batch)
    check(f"{name}: a step lowers the loss", loss_of(model, batch) < loss_before)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(base(make), folder)
    if task != "SEQ_CLS":  # whose head is drawn anew, and loaded with the adapter
        check(f"{name}: without the adapter it is the base", torch.equal(without(again, batch), before))
    check(f"{name}: loading gives what was saved", torch.equal(outputs(again, batch), after))

    merged = again.merge_and_unload()
    check(f"{name}: merged it answers as before", torch.allclose(outputs(merged, batch), after, atol=1e-5))

    if task != "SEQ_CLS":
        model.add_adapter("other", IA3Config(task_type=task))
        mixed = outputs(model, batch, adapter_names=["default", "__base__"])
        expected = torch.stack([after[0], before[1]])
        check(f"{name}: a batch mixes adapters", torch.allclose(mixed, expected, atol=1e-5))
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        told = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        check(
            f"{name}: it generates as merged",
            torch.equal(told, merged.generate(**inputs, max_new_tokens=4, do_sample=False)),
        )


def without(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with model.disable_adapter():
        return outputs(model, batch)


if __name__ == "__main__":
    for name in ia3.__all__:  # each is loaded with what it needs
        getattr(ia3, name)
    run(llama, "CAUSAL_LM", {"input_ids": IDS, "labels": IDS})
    run(t5, "SEQ_2_SEQ_LM", {"input_ids": IDS, "labels": IDS[:, :4].contiguous()})
    run(bert, "SEQ_CLS", {"input_ids": IDS, "labels": torch.tensor([0, 1])})
    print(f"The seven things hold with {versions()}.")
