"""What surrounds a model in use: threads, copies, processes, checkpointing, devices, callers of submodules."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import multiprocessing

from builders import CAUSAL, adapted, llama, randomise, seq2seq_batch, t5, vector_gradients
from ia3 import IA3Config, PeftModelForSeq2SeqLM, get_peft_model
from ia3.hooks import SiteVectors


def test_two_forwards_before_one_backward():
    model = adapted(t5(), "a")
    first, second = seq2seq_batch(seed=3), seq2seq_batch(seed=4)
    (model(**first).loss + model(**second).loss).backward()
    together = vector_gradients(model)
    model.zero_grad()
    model(**first).loss.backward()
    model(**second).loss.backward()
    for name, gradient in vector_gradients(model).items():
        torch.testing.assert_close(together[name], gradient)


def test_switching_between_two_forwards_keeps_each_graph():
    model = adapted(t5(), "a")
    batch = seq2seq_batch()
    loss = model(**batch).loss
    model.set_adapter("a")
    other = model(**batch).loss
    model.set_requires_grad("default")  # activating another adapter froze it
    (loss + other).backward()
    gradients = vector_gradients(model)
    assert {name.rsplit(".", 1)[-1] for name in gradients} == {"default", "a"}


def test_two_threads():
    model = adapted(t5())
    batches = [seq2seq_batch(seed=seed) for seed in range(8)]
    with torch.no_grad():
        alone = [model(**batch).logits for batch in batches]
        barrier = threading.Barrier(2)

        def run(index):
            barrier.wait()
            return [model(**batches[i]).logits for i in range(index, 8, 2) for _ in range(5)][::5]

        with ThreadPoolExecutor(2) as pool:
            even, odd = pool.map(run, range(2))
    for index, got in enumerate(x for pair in zip(even, odd, strict=True) for x in pair):
        assert torch.equal(got, alone[index])


def test_two_threads_train():
    model = adapted(t5())
    batches = [seq2seq_batch(seed=seed) for seed in range(2)]
    for batch in batches:
        model(**batch).loss.backward()
    alone = vector_gradients(model)
    model.zero_grad()
    with ThreadPoolExecutor(2) as pool:
        losses = list(pool.map(lambda batch: model(**batch).loss, batches))
    sum(losses).backward()
    for name, gradient in vector_gradients(model).items():
        torch.testing.assert_close(gradient, alone[name])


def test_a_deep_copy_is_independent():
    model = adapted(t5(), "a")
    batch = seq2seq_batch()
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    before = model(**batch).logits
    assert torch.equal(twin(**batch).logits, before)
    randomise(twin, seed=9)
    twin.set_adapter("a")
    assert torch.equal(model(**batch).logits, before)
    assert not torch.equal(twin(**batch).logits, before)
    assert model.active_adapter == "default"
    with twin.disable_adapter():
        assert torch.equal(model(**batch).logits, before)


def test_pickle_keeps_everything():
    model = adapted(t5(), "a")
    batch = seq2seq_batch()
    twin = pickle.loads(pickle.dumps(model))
    assert isinstance(twin, PeftModelForSeq2SeqLM)
    assert type(twin) is type(model)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    for each in (model, twin):
        each.set_adapter("a")
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    randomise(twin, seed=9)  # the hooks and the parameters are still the same tensors
    assert not torch.equal(twin(**batch).logits, model(**batch).logits)
    twin(**batch).loss.backward()
    assert vector_gradients(twin)


def test_torch_save_of_the_whole_model(tmp_path):
    model = adapted(t5())
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    batch = seq2seq_batch()
    assert torch.equal(twin(**batch).logits, model(**batch).logits)


def logits_in_child(model, batch, queue):
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(**batch).logits.numpy())


def test_spawn():
    model = adapted(t5())
    batch = seq2seq_batch()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=logits_in_child, args=(model, batch, queue))
    child.start()
    got = torch.from_numpy(queue.get(timeout=120))
    child.join()
    with torch.no_grad():
        torch.testing.assert_close(got, model(**batch).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before attaching", "after attaching"])
@pytest.mark.parametrize("build", [t5, llama])
def test_gradient_checkpointing(reentrant, when, build):
    batch = seq2seq_batch() if build is t5 else {k: seq2seq_batch()["input_ids"] for k in ("input_ids", "labels")}
    config = {} if build is t5 else CAUSAL
    plain = adapted(build(), **config).train()
    plain(**batch).loss.backward()
    arguments = {"use_reentrant": reentrant}
    model = build()
    if when == "before attaching":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    model = adapted(model, **config).train()
    if when == "after attaching":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    model(**batch, use_cache=False).loss.backward()
    expected, got = vector_gradients(plain), vector_gradients(model)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name])


def test_vectors_act_whichever_module_is_entered():
    base, model = t5(), adapted(t5())
    batch = seq2seq_batch()
    entered = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        inside = model(**batch, output_hidden_states=True).encoder_last_hidden_state
        assert torch.equal(model.encoder(**entered).last_hidden_state, inside)
        assert torch.equal(model.get_encoder()(**entered).last_hidden_state, inside)
        assert not torch.allclose(base.encoder(**entered).last_hidden_state, inside)


def test_the_base_model_keeps_its_behaviour():
    import inspect

    base, model = t5(), get_peft_model(t5(), IA3Config(task_type="SEQ_2_SEQ_LM"))
    assert type(model).__name__ == type(base).__name__
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    assert set(base.state_dict()) < set(model.state_dict())
    assert model.base_model_prefix == base.base_model_prefix
    assert model.can_generate()
    assert isinstance(model, type(base))
    assert type(type(model)(base.config)) is type(base)
    assert model.get_base_model() is model


def test_device_map_before_attaching(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import T5ForConditionalGeneration

    t5().save_pretrained(tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    batch = seq2seq_batch()
    torch.testing.assert_close(adapted(loaded)(**batch).logits, adapted(t5())(**batch).logits)


def test_a_base_offloaded_to_disk_before_attaching(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    base = t5(tie_word_embeddings=False)
    expected = adapted(t5(tie_word_embeddings=False))
    device_map = {"shared": "cpu", "lm_head": "cpu", "encoder": "cpu", "decoder": "disk"}
    base = accelerate.dispatch_model(base, device_map, main_device="cpu", offload_dir=tmp_path)
    assert next(base.decoder.block[0].parameters()).is_meta
    model = adapted(base)
    assert not any(p.is_meta for n, p in model.named_parameters() if ".ia3_l." in n)
    batch = seq2seq_batch()
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected(**batch).loss)
    loss.backward()
    expected(**batch).loss.backward()
    for name, gradient in vector_gradients(expected).items():
        torch.testing.assert_close(vector_gradients(model)[name], gradient)


@pytest.mark.parametrize("move", ["to", "to_empty", "load_state_dict"])
def test_the_hooks_follow_replaced_parameters(move):
    model, expected = adapted(t5()), adapted(t5()).double()
    if move == "to":
        model.to(torch.float64)
    else:
        state = {name: tensor.double() for name, tensor in model.state_dict().items()}
        if move == "to_empty":
            model.to("meta").to_empty(device="cpu")
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        model.set_requires_grad("default")
    batch = seq2seq_batch()
    torch.testing.assert_close(model(**batch).logits, expected(**batch).logits)
    model(**batch).loss.backward()
    assert len(vector_gradients(model)) == 16
    for module in model.modules():
        if isinstance(module, SiteVectors):  # what a compiled graph reads
            acting = (*module.input_vectors, *module.output_vectors)
            assert [id(vector) for vector in acting] == [id(module.default)]


def test_functional_call_is_heard():
    model = adapted(t5())
    batch = seq2seq_batch()
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters() if ".ia3_l." in name}
    got = torch.func.functional_call(model, doubled, (), batch).loss
    assert not torch.allclose(got, model(**batch).loss)

    def loss(values):
        return torch.func.functional_call(model, values, (), batch).loss

    gradients = torch.func.grad(loss)({n: p.detach() for n, p in model.named_parameters() if ".ia3_l." in n})
    model(**batch).loss.backward()
    for name, gradient in vector_gradients(model).items():
        torch.testing.assert_close(gradients[name], gradient)


def test_a_replica_reads_its_own_vectors():
    model = adapted(t5())
    replica = model.encoder.block[0].layer[0].SelfAttention.k._replicate_for_data_parallel()
    assert isinstance(model._replicate_for_data_parallel(), type(model))
    container = replica._modules["ia3_l"]._replicate_for_data_parallel()
    replica._modules["ia3_l"] = container
    container.default = torch.full((16, 1), 3.0)  # as torch.nn.parallel.replicate sets it
    x = torch.randn(2, 16)
    weight = model.encoder.block[0].layer[0].SelfAttention.k.weight
    replica.weight = weight.detach()
    replica._parameters["bias"] = None
    torch.testing.assert_close(replica(x), 3 * x @ weight.detach().T)


def test_a_compiled_model_is_refused_before_anything_changes():
    base = t5()
    with pytest.raises(ValueError, match="attach the adapter first"):
        get_peft_model(torch.compile(base), IA3Config(task_type="SEQ_2_SEQ_LM"))
    assert all(p.requires_grad for p in base.parameters())
    assert "_ia3" not in base.__dict__


def test_autocast():
    model = adapted(t5())
    batch = seq2seq_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert all(gradient.dtype == torch.float32 for gradient in vector_gradients(model).values())
    torch.testing.assert_close(loss, model(**batch).loss, atol=0.05, rtol=0.05)
