"""`torch.compile`: one graph, and no recompilation when adapters are switched."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from builders import CAUSAL, SEQ2SEQ, adapted, gpt2, llama, randomise, seq2seq_batch, t5

MODELS = {"t5": (t5, SEQ2SEQ), "llama": (llama, CAUSAL), "gpt2": (gpt2, CAUSAL)}


def needs_a_compilable_base(build, batch):
    """Skip where the bare base doesn't compile in one graph with these versions of torch and transformers."""
    torch._dynamo.reset()
    try:
        torch.compile(build(), backend="eager", fullgraph=True)(**batch)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"the bare base model doesn't compile in one graph: {str(error).splitlines()[0]}")


def inputs(kind):
    batch = seq2seq_batch()
    if kind == "t5":
        return batch
    return {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}


@pytest.mark.parametrize("kind", MODELS)
def test_switching_adapters_does_not_recompile(kind):
    build, config = MODELS[kind]
    needs_a_compilable_base(build, inputs(kind))
    model = adapted(build(), "a", "b", "c", **config)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batch = inputs(kind)
    seen = []
    for name in ["default", "a", "b", "c", "a", "default"]:
        model.set_adapter(name)
        got = compiled(**batch).logits
        torch.testing.assert_close(got, model(**batch).logits)
        seen.append(got.detach())
    assert counter.frame_count == 1
    assert not torch.allclose(seen[0], seen[1])
    assert torch.equal(seen[0], seen[-1])


def test_one_graph_without_breaks():
    needs_a_compilable_base(t5, seq2seq_batch())
    model = adapted(t5())
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(model)(**seq2seq_batch())
    assert explanation.graph_count == 1
    assert explanation.graph_break_count == 0


def test_compiled_gradients_equal_eager_ones():
    needs_a_compilable_base(t5, seq2seq_batch())
    model = adapted(t5())
    batch = seq2seq_batch()
    model(**batch).loss.backward()
    eager = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).loss.backward()
    assert len(eager) == 2 * 3 + 2 * 5
    for name, parameter in model.named_parameters():
        if name in eager:
            torch.testing.assert_close(parameter.grad, eager[name])


def test_disabling_compiles_once_more_and_both_graphs_stay():
    needs_a_compilable_base(t5, seq2seq_batch())
    model = adapted(t5(), "a")
    batch = seq2seq_batch()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(**batch)
        with model.disable_adapter():
            torch.testing.assert_close(compiled(**batch).logits, t5()(**batch).logits)
    assert counter.frame_count == 2


def test_a_compiled_graph_sees_new_values():
    needs_a_compilable_base(t5, seq2seq_batch())
    model = adapted(t5())
    batch = seq2seq_batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(**batch)
    randomise(model, seed=9)
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
