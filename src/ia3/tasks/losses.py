"""The three losses of T-Few (Liu et al. 2022, section 3.2), and the scores of answer choices that they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from ia3.fast.cache import additive_mask
from ia3.fast.ragged import IGNORE_INDEX


@dataclass(frozen=True)
class TFewLosses:
    """The losses of one batch, each a scalar.

    Args:
        language_model: L_LM, the cross-entropy of the correct choices' tokens.
        unlikelihood: L_UL, which is large where a token of a wrong choice is likely.
        length_normalised: L_LN, the cross-entropy of the correct choice among all, by their mean
            log-probabilities.
    """

    language_model: Tensor
    unlikelihood: Tensor
    length_normalised: Tensor

    @property
    def total(self) -> Tensor:
        """L_LM + L_UL + L_LN, what T-Few minimises."""
        return self.language_model + self.unlikelihood + self.length_normalised


def tfew_losses(logits: Tensor, choices: Tensor, correct: Tensor) -> TFewLosses:
    """The losses of equations 1 to 3 of Liu et al. 2022, over a batch.

    With the correct choice y and the wrong choices ŷ⁽ⁿ⁾ of T⁽ⁿ⁾ tokens, for one example:

        L_LM = − Σ_t log p(y_t | x, y_<t) / T
        L_UL = − Σ_n Σ_t log(1 − p(ŷ⁽ⁿ⁾_t | x, ŷ⁽ⁿ⁾_<t)) / Σ_n T⁽ⁿ⁾
        β(z) = Σ_t log p(z_t | x, z_<t) / T
        L_LN = − log(exp β(y) / (exp β(y) + Σ_n exp β(ŷ⁽ⁿ⁾)))

    Over a batch, L_LM and L_UL are means over all its correct and all its wrong tokens, as in a seq2seq
    model's own loss; L_LN is the mean over the examples. log(1 − p) is the log-sum of all other tokens'
    probabilities, which stays exact and keeps its gradient where p rounds to one; the authors' code adds 0.01
    within that logarithm instead.

    Args:
        logits: `[examples, choices, length, vocabulary]`; summed in float32 where they are of half precision.
        choices: the choices' tokens `[examples, choices, length]`, padded with -100. A row of -100 alone is
            no choice, for examples with fewer than others.
        correct: which choice is right `[examples]`.

    Raises:
        ValueError: shapes that don't fit together, or a single choice.
    """
    if choices.dim() != 3 or logits.shape[:-1] != choices.shape or correct.shape != choices.shape[:1]:
        raise ValueError(
            "Expected logits [examples, choices, length, vocabulary], choices [examples, choices, length] and "
            f"correct [examples]; got {tuple(logits.shape)}, {tuple(choices.shape)} and {tuple(correct.shape)}."
        )
    if choices.shape[1] < 2:
        raise ValueError(
            "There is one choice an example, so none is wrong: pass at least two, or train on the correct one "
            "with the model's own loss."
        )
    logits = _wide(logits)
    present = choices != IGNORE_INDEX
    right = (torch.arange(choices.shape[1], device=choices.device) == correct.unsqueeze(-1)).unsqueeze(-1)
    log_probabilities = token_log_probabilities(logits, choices)
    scores = choice_scores(log_probabilities, choices)
    return TFewLosses(
        language_model=-_mean(log_probabilities, present & right),
        unlikelihood=-_mean(_log_complements(logits, choices), present & ~right),
        length_normalised=-scores.log_softmax(dim=-1).gather(-1, correct.unsqueeze(-1)).mean(),
    )


def choice_logits(
    model: Any,
    choices: Tensor,
    *,
    attention_mask: Tensor,
    input_ids: Tensor | None = None,
    encoded: Tensor | None = None,
) -> Tensor:
    """Run the encoder once an example, and the decoder on all choices of all examples in one batch.

    Where the decoder knows positions by their distance alone, as T5's does, an example's choices stand one after the
    other in one row, each hidden from the others: the keys and values of the encoder's output are then computed once
    an example instead of once a choice. The logits are the same.

    Args:
        model: a seq2seq model of transformers, with or without an adapter.
        choices: tokens `[examples, choices, length]`, padded with -100.
        attention_mask: `[examples, input length]`, or what is added to the scores, `[examples, 1, 1, input length]`.
        input_ids: `[examples, input length]`.
        encoded: what the encoder makes of them, `[examples, input length, width]`, in their place.

    Returns:
        Logits `[examples, choices, length, vocabulary]`.

    Raises:
        ValueError: the model has no encoder and decoder.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is no encoder-decoder model, so its encoder can't be run once for all "
            "choices: pass a seq2seq model, such as a T5 or a BART."
        )
    if encoded is None:
        encoded = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    if hides_choices(model):
        shifted = model.prepare_decoder_input_ids_from_labels(choices.flatten(0, 1)).view(len(choices), -1)
        given = {"decoder_input_ids": shifted, "decoder_attention_mask": _side_by_side(choices, model.dtype)}
    else:
        # Each family shifts its labels in its own way, and only the model's forward knows it in all of them.
        given = {"labels": choices.flatten(0, 1)}
        count = choices.shape[1]
        encoded, attention_mask = (each.repeat_interleave(count, dim=0) for each in (encoded, attention_mask))
    encoder_outputs = BaseModelOutput(last_hidden_state=encoded)
    output = model(encoder_outputs=encoder_outputs, attention_mask=attention_mask, **given, use_cache=False)
    logits: Tensor = output.logits
    return logits.view(*choices.shape, -1)


def hides_choices(model: Any) -> bool:
    """Whether a decoder's positions are distances and its attention takes masks, so that choices may share a row."""
    return model.config.model_type in ("t5", "mt5") and model.config._attn_implementation in ("sdpa", "eager")


def _side_by_side(choices: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of choices in one row, `[1, 1, all, all]`: each sees its own earlier tokens."""
    count, length = choices.shape[1:]
    place = torch.arange(count * length, device=choices.device)
    seen = (place[:, None] >= place) & (place[:, None] // length == place // length)
    return additive_mask(seen[None, None], dtype)


def choice_log_probabilities(model: Any, choices: Tensor, **inputs: Tensor) -> Tensor:
    """The log-probability of each token of each choice, `[examples, choices, length]`; see `choice_logits`."""
    return token_log_probabilities(choice_logits(model, choices, **inputs), choices)


def token_log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of each token, 0 where it is -100.

    Args:
        logits: `[…, length, vocabulary]`.
        tokens: `[…, length]`.

    Returns:
        `[…, length]`, in float32 where the logits are of half precision.
    """
    logits = _wide(logits)
    found = logits.gather(-1, _as_index(tokens)).squeeze(-1)
    return (found - logits.logsumexp(dim=-1)).masked_fill(tokens == IGNORE_INDEX, 0.0)


def choice_scores(log_probabilities: Tensor, choices: Tensor, *, length_normalised: bool = True) -> Tensor:
    """One score a choice: the mean of its tokens' log-probabilities, or their sum.

    Args:
        log_probabilities: `[examples, choices, length]`.
        choices: tokens of the same shape, padded with -100.
        length_normalised: the mean, as in T-Few; False takes the sum, which favours short choices.

    Returns:
        `[examples, choices]`, −∞ for a choice without tokens.
    """
    present = choices != IGNORE_INDEX
    lengths = present.sum(dim=-1)
    scores = log_probabilities.masked_fill(~present, 0.0).sum(dim=-1)
    if length_normalised:
        scores = scores / lengths.clamp(min=1)
    return scores.masked_fill(lengths == 0, -torch.inf)


def pad_choices(choices: Sequence[Sequence[int]]) -> Tensor:
    """Stack choices of different lengths, padded with -100: `[choices, longest]`."""
    length = max(len(ids) for ids in choices)
    return torch.tensor([[*ids, *[IGNORE_INDEX] * (length - len(ids))] for ids in choices])


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _as_index(tokens: Tensor) -> Tensor:
    """Tokens `[…, length]` as an index into the vocabulary `[…, length, 1]`, any where they are ignored."""
    return tokens.masked_fill(tokens == IGNORE_INDEX, 0).unsqueeze(-1)


def _log_complements(logits: Tensor, tokens: Tensor) -> Tensor:
    """log(1 − p) of each token, `[…, length]`."""
    others = logits.scatter(-1, _as_index(tokens), -torch.inf)
    return others.logsumexp(dim=-1) - logits.logsumexp(dim=-1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean where the mask is true, 0 where it nowhere is."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
