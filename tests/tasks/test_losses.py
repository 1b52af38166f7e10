from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import builders
from ia3.tasks.losses import (
    choice_log_probabilities,
    choice_logits,
    choice_scores,
    pad_choices,
    tfew_losses,
    token_log_probabilities,
)

VOCABULARY = 6


def hand_made(lengths: list[list[int]], seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Random float64 logits and choices of these lengths, one list an example."""
    generator = torch.Generator().manual_seed(seed)
    count, longest = max(map(len, lengths)), max(map(max, lengths))
    shape = (len(lengths), count, longest)
    logits = spread * torch.randn(*shape, VOCABULARY, generator=generator, dtype=torch.float64)
    choices = torch.randint(0, VOCABULARY, shape, generator=generator)
    for example, row in enumerate(lengths):
        for choice in range(count):
            choices[example, choice, row[choice] if choice < len(row) else 0 :] = -100
    return logits, choices


def by_hand(logits: Tensor, choices: Tensor, correct: list[int]) -> tuple[float, float, float]:
    """Equations 1 to 3 of the paper, number by number."""
    right, wrong, chosen = [], [], []
    for example, answer in enumerate(correct):
        means = {}
        for choice, tokens in enumerate(choices[example].tolist()):
            probabilities = []
            for place, token in enumerate(tokens):
                if token != -100:
                    weights = [math.exp(each) for each in logits[example, choice, place].tolist()]
                    probabilities.append(weights[token] / sum(weights))
            if not probabilities:
                continue
            means[choice] = sum(map(math.log, probabilities)) / len(probabilities)
            (right if choice == answer else wrong).extend(probabilities)
        chosen.append(-math.log(math.exp(means[answer]) / sum(map(math.exp, means.values()))))
    language_model = -sum(math.log(p) for p in right) / len(right)
    unlikelihood = -sum(math.log(1 - p) for p in wrong) / len(wrong)
    return language_model, unlikelihood, sum(chosen) / len(chosen)


def computed(logits: Tensor, choices: Tensor, correct: list[int]) -> tuple[float, float, float]:
    losses = tfew_losses(logits, choices, torch.tensor(correct))
    return losses.language_model.item(), losses.unlikelihood.item(), losses.length_normalised.item()


def logits_for(probabilities: list[list[float]]) -> tuple[Tensor, Tensor]:
    """One example whose choices' tokens have exactly these probabilities, among two tokens."""
    choices = pad_choices([[0] * len(row) for row in probabilities]).unsqueeze(0)
    logits = torch.zeros(*choices.shape, 2, dtype=torch.float64)
    for choice, row in enumerate(probabilities):
        for place, p in enumerate(row):
            logits[0, choice, place] = torch.tensor([p, 1 - p], dtype=torch.float64).log()
    return logits, choices


@st.composite
def batches(draw: Any) -> tuple[list[list[int]], list[int], int]:
    """Lengths of two to four choices for one to four examples, some with fewer; the right ones; a seed."""
    count = draw(st.integers(2, 4))
    row = st.lists(st.integers(1, 4), min_size=2, max_size=count)
    lengths = draw(st.lists(row, min_size=1, max_size=4))
    return lengths, [draw(st.integers(0, len(row) - 1)) for row in lengths], draw(st.integers(0, 2**20))


@given(batches())
def test_the_papers_equations(batch: tuple[list[list[int]], list[int], int]) -> None:
    lengths, correct, seed = batch
    logits, choices = hand_made(lengths, seed)
    assert computed(logits, choices, correct) == pytest.approx(by_hand(logits, choices, correct), rel=1e-11)


def test_a_uniform_model() -> None:
    logits, choices = hand_made([[2, 1, 4], [3, 3, 1]])
    uniform = torch.zeros_like(logits)
    expected = (math.log(VOCABULARY), -math.log(1 - 1 / VOCABULARY), math.log(3))
    assert computed(uniform, choices, [0, 2]) == pytest.approx(expected)


def test_unlikelihood_counts_every_wrong_token_once() -> None:
    # One wrong token at 1/2 and three at 1/4: a mean of the choices' means would weigh the first three times.
    logits, choices = logits_for([[0.3], [0.5], [0.25, 0.25, 0.25]])
    _, unlikelihood, _ = computed(logits, choices, [0])
    assert unlikelihood == pytest.approx(-(math.log(0.5) + 3 * math.log(0.75)) / 4)
    assert unlikelihood != pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2, rel=0.1)
    assert unlikelihood != pytest.approx(-(math.log(0.5) + 3 * math.log(0.75)) / 2, rel=0.1)


def test_long_choices_are_not_punished() -> None:
    logits, choices = logits_for([[0.5, 0.5, 0.5, 0.5], [0.5]])
    assert computed(logits, choices, [0])[2] == pytest.approx(math.log(2))
    log_probabilities = token_log_probabilities(logits, choices)
    assert choice_scores(log_probabilities, choices).tolist() == [pytest.approx([math.log(0.5)] * 2)]
    sums = choice_scores(log_probabilities, choices, length_normalised=False)
    assert sums.tolist() == [pytest.approx([4 * math.log(0.5), math.log(0.5)])]


def test_the_language_model_loss_is_a_mean_over_tokens_not_examples() -> None:
    logits, choices = hand_made([[1, 2], [4, 3]])
    each = [computed(logits[i : i + 1], choices[i : i + 1], [0])[0] for i in range(2)]
    assert computed(logits, choices, [0, 0])[0] == pytest.approx((each[0] + 4 * each[1]) / 5)


def test_the_total_weighs_the_losses_equally() -> None:
    logits, choices = hand_made([[1, 2], [4, 3]])
    losses = tfew_losses(logits, choices, torch.tensor([0, 1]))
    assert losses.total.item() == pytest.approx(sum(computed(logits, choices, [0, 1])))


@given(batches(), st.integers(0, 3))
def test_padding_changes_nothing(batch: tuple[list[list[int]], list[int], int], more: int) -> None:
    lengths, correct, seed = batch
    logits, choices = hand_made(lengths, seed)
    examples, count, longest = choices.shape
    wider = torch.full((examples, count + 1, longest + more), -100)
    wider[:, :count, :longest] = choices
    padded = 1e3 * torch.randn(*wider.shape, VOCABULARY, dtype=torch.float64)
    padded[:, :count, :longest] = torch.where((choices != -100).unsqueeze(-1), logits, padded[:, :count, :longest])
    assert computed(padded, wider, correct) == pytest.approx(computed(logits, choices, correct), rel=1e-12)

    padded.requires_grad_(True)
    tfew_losses(padded, wider, torch.tensor(correct)).total.backward()
    assert padded.grad is not None
    assert padded.grad[wider == -100].abs().max() == 0
    assert padded.grad[wider != -100].abs().sum() > 0


def test_the_gradients() -> None:
    logits, choices = hand_made([[2, 1, 3], [3, 2]], spread=1.0)
    logits.requires_grad_(True)
    for name in ("language_model", "unlikelihood", "length_normalised"):
        assert torch.autograd.gradcheck(
            lambda values, name=name: getattr(tfew_losses(values, choices, torch.tensor([2, 0])), name), (logits,)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_certain_tokens_stay_finite_and_keep_their_gradient(dtype: torch.dtype) -> None:
    # p rounds to 1 for the wrong choice and to 0 for the right one; log(1 − p) = −1000 exactly.
    logits = torch.zeros(1, 2, 1, 2, dtype=dtype)
    logits[0, 0, 0] = torch.tensor([-1000.0, 0.0])
    logits[0, 1, 0] = torch.tensor([1000.0, 0.0])
    logits.requires_grad_(True)
    losses = tfew_losses(logits, torch.zeros(1, 2, 1, dtype=torch.long), torch.tensor([0]))
    assert losses.language_model == losses.unlikelihood == losses.length_normalised == 1000
    losses.unlikelihood.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1, 0].tolist() == [1, -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits, choices = hand_made([[2, 1, 3], [3, 2]])
    half = logits.to(dtype)
    losses = tfew_losses(half, choices, torch.tensor([2, 0]))
    assert losses.total.dtype == torch.float32
    expected = by_hand(half.double(), choices, [2, 0])
    assert computed(half, choices, [2, 0]) == pytest.approx(expected, rel=1e-5)


def test_an_example_with_no_wrong_choice_adds_nothing() -> None:
    logits, choices = hand_made([[2], [3, 2]])
    assert computed(logits, choices, [0, 1])[1] == pytest.approx(computed(logits[1:], choices[1:], [1])[1])
    assert computed(logits[:1], choices[:1], [0])[1:] == (0, 0)


def test_a_right_choice_without_tokens_is_no_finite_loss() -> None:
    logits, choices = hand_made([[2], [3, 2]])
    assert computed(logits, choices, [1, 0])[2] == math.inf


@pytest.mark.parametrize("correct", [-100, -1, 2])
def test_an_answer_that_is_no_choice_is_refused(correct: int) -> None:
    logits, choices = hand_made([[2, 3]])
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        tfew_losses(logits, choices, torch.tensor([correct]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    logits, choices = hand_made([[2, 3], [1, 2]])
    correct = torch.tensor([0, 1])
    for wrong in ((logits[0], choices[0], correct), (logits[:1], choices, correct), (logits, choices, correct[:1])):
        with pytest.raises(ValueError, match=r"Expected logits \[examples, choices, length, vocabulary\]"):
            tfew_losses(*wrong)


def test_a_single_choice_is_refused() -> None:
    logits, choices = hand_made([[2]])
    with pytest.raises(ValueError, match="one choice an example"):
        tfew_losses(logits, choices, torch.tensor([0]))


def test_choices_of_different_lengths_are_padded() -> None:
    assert pad_choices([[5], [6, 7, 8]]).tolist() == [[5, -100, -100], [6, 7, 8]]


# With a model


def t5() -> Any:
    return builders.adapted(builders.t5(dtype=torch.float64))


def bart_like(kind: str) -> Any:
    """BART and M2M-100, which shift their labels each in their own way."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
    )
    model = AutoModelForSeq2SeqLM.from_config(config).double().eval()
    targets = ["k_proj", "v_proj", "fc2"]
    return builders.adapted(model, **builders.SEQ2SEQ, target_modules=targets, feedforward_modules=["fc2"])


MODELS = {"t5": t5, "bart": partial(bart_like, "bart"), "m2m-100": partial(bart_like, "m2m_100")}
CHOICES = torch.stack([pad_choices([[9, 1], [7, 8, 3, 1], [2]]), pad_choices([[5, 1], [6], [4, 4, 1, 1]])])


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    batch = builders.seq2seq_batch(size=2)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def alone(model: Any, inputs: dict[str, Tensor], example: int, choice: int) -> Tensor:
    """The model's own loss of one choice after one text, neither of them padded."""
    length = int(inputs["attention_mask"][example].sum())
    tokens = CHOICES[example, choice]
    return model(
        input_ids=inputs["input_ids"][example : example + 1, :length], labels=tokens[tokens != -100].unsqueeze(0)
    ).loss


def test_each_choice_is_scored_as_if_alone(model: Any, inputs: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        log_probabilities = choice_log_probabilities(model, CHOICES, **inputs)
        expected = -torch.stack([torch.stack([alone(model, inputs, i, j) for j in range(3)]) for i in range(2)])
    assert log_probabilities.shape == CHOICES.shape
    torch.testing.assert_close(choice_scores(log_probabilities, CHOICES), expected, rtol=0, atol=1e-10)


def test_the_gradient_is_that_of_the_choices_alone(model: Any, inputs: dict[str, Tensor]) -> None:
    correct = torch.tensor([1, 2])
    tfew_losses(choice_logits(model, CHOICES, **inputs), CHOICES, correct).length_normalised.backward()
    together = builders.vector_gradients(model)
    model.zero_grad()
    scores = -torch.stack([torch.stack([alone(model, inputs, i, j) for j in range(3)]) for i in range(2)])
    torch.nn.functional.cross_entropy(scores, correct).backward()
    expected = builders.vector_gradients(model)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    # T5's layer norms compute in float32, whose gradients depend on the order of the sums.
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-8)


def test_the_language_model_loss_is_the_models_own(model: Any, inputs: dict[str, Tensor]) -> None:
    correct = torch.tensor([1, 2])
    losses = tfew_losses(choice_logits(model, CHOICES, **inputs), CHOICES, correct)
    own = model(**inputs, labels=CHOICES[torch.arange(2), correct]).loss
    torch.testing.assert_close(losses.language_model, own, rtol=1e-12, atol=0)


def test_the_encoder_runs_once_an_example(model: Any, inputs: dict[str, Tensor]) -> None:
    seen = []
    model.get_encoder().register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.shape))
    choice_logits(model, CHOICES, **inputs)
    assert [shape[0] for shape in seen] == [2]


def test_a_model_without_an_encoder_is_refused(inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="no encoder-decoder model"):
        choice_logits(builders.llama(), CHOICES, **inputs)
