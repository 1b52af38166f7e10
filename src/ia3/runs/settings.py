"""How to train: the model whose fields are keywords, keys of a recipe and flags of the command line at once.

A field's text is its help on the command line and its line in the API's reference.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from ia3.errors import SettingError, shorten
from ia3.tasks.task import MOST_TOKENS, AnswerBy, Precision, Quantisation

ModelT = TypeVar("ModelT")


# How many of a recipe's problems an error tells.
_MOST_PROBLEMS = 4

LARGEST = 2**53
"""The most of a count, and of a seed: what torch's generators hold, and more than any training does."""


@dataclass(frozen=True)
class Flag:
    """How the command line shows a setting.

    Args:
        panel: its group in `--help`; None for the first.
        also: a second name.
        unset: what None stands for.
    """

    panel: str | None
    also: str | None = None
    unset: str | None = None


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def checked(cls: type[ModelT]) -> type[ModelT]:
    """A frozen dataclass whose values pydantic checks, also those that `dataclasses.replace` puts in.

    Its texts below the fields are their descriptions. What is wrong is a `SettingError`.
    """
    config = pydantic.ConfigDict(use_attribute_docstrings=True, extra="forbid")
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    init: Callable[..., None] = made.__init__

    def checked_init(self: Any, **given: Any) -> None:
        try:
            init(self, **given)
        except ValidationError as error:
            first = {str(each["loc"][:1]): each for each in reversed(error.errors())}  # of a union's, the first
            problems = [_explain(each, field_names(cls)) for each in reversed(first.values())]
            more = [f"and {len(problems) - _MOST_PROBLEMS:,} more."] if len(problems) > _MOST_PROBLEMS else []
            raise SettingError("; ".join([*problems[:_MOST_PROBLEMS], *more])) from error

    made.__init__ = checked_init
    inherited = {name: field for base in cls.__bases__ for name, field in fields_of(base).items()}
    for name, field in fields_of(made).items():
        if field.description is None and name in inherited:  # pydantic reads the texts of the class alone
            field.description = inherited[name].description
    finished: type[ModelT] = made
    return finished


def fields_of(model: type) -> dict[str, FieldInfo]:
    """A model's fields: types, defaults, texts and flags."""
    return getattr(model, "__pydantic_fields__", {})


def field_names(model: Any) -> tuple[str, ...]:
    """The names of a model's fields."""
    return tuple(field.name for field in dataclasses.fields(model))


def full_name(name: str) -> str:
    """A setting's name, from its second one, too."""
    fields = fields_of(TrainSettings).items()
    return next((full for full, each in fields for how in each.metadata if getattr(how, "also", "") == name), name)


def nearest(name: str, known: Iterable[str]) -> str:
    """A question after the name that was meant, or all names."""
    known = sorted(known)
    found = difflib.get_close_matches(full_name(name[:100]), known, n=1)
    return f"Did you mean `{found[0]}`?" if found else f"The settings are {', '.join(known)}."


def say_long_warmup(warmup: int, steps: int) -> str:
    """What is wrong with a warm-up that is as long as the training."""
    return f"`warmup_steps` is {warmup} and the training has {steps} steps: expected fewer."


def _explain(problem: Any, known: tuple[str, ...]) -> str:
    """One of pydantic's errors as a sentence."""
    kind, name, value = problem["type"], str(problem["loc"][0]) if problem["loc"] else "", problem["input"]
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "missing":
        return f"There is no `{name}`: give it, or name it in a recipe."
    if kind == "unexpected_keyword_argument":
        return f"There is no setting {shorten(name)}. {nearest(name, known)}"
    expected = {
        "greater_than": "expected a positive number",
        "greater_than_equal": "expected 0 or a positive number",
        "less_than": "expected a fraction between 0 and 1",
        "finite_number": "expected a positive number",
        "less_than_equal": f"expected at most {problem.get('ctx', {}).get('le', 0):,}",
        "float_parsing": "expected a number",
        "int_parsing": "expected a whole number",
    }.get(kind, f"{problem['msg'][:1].lower()}{problem['msg'][1:]}")
    return f"`{name}` is {shorten(value)}: {expected}."


Positive = Annotated[int, Field(gt=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
Tokens = Annotated[int, Field(gt=0, le=MOST_TOKENS)]
Rounding = Annotated[int, Field(gt=0, le=65_536)]  # beyond, padding would be nearly all of a batch
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_STEPS, _DATA, _TASK, _EVALUATION = Flag("Steps"), Flag("Data"), Flag("Task"), Flag("Evaluation")


@checked
class TrainSettings:
    """How to train; the defaults are those of PEFT's guide to IA3, with batches padded to their longest row.

    Raises:
        ValueError: an unknown name, a number out of its range, a value of another type.
    """

    epochs: Annotated[Positive, _STEPS] = 3
    """Passes over the training examples."""
    steps: Annotated[Positive | None, _STEPS] = None
    """How many steps to train for, instead of `epochs`."""
    learning_rate: Annotated[PositiveReal, Flag("Steps", also="lr")] = 8e-3
    """The highest learning rate; it falls linearly to 0 at the end."""
    warmup_steps: Annotated[int, Field(ge=0, le=LARGEST), _STEPS] = 0
    """Over how many steps the rate rises linearly from 0 first."""
    optimizer: Annotated[Literal["adamw", "adafactor"], _STEPS] = "adamw"
    """AdamW, or Adafactor as in T-Few (transformers', without relative steps)."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False), _STEPS] = 0.0
    """How much of its way back a number goes a step, times the rate: a vector towards one, which is the base model, a
    module trained in full towards zero."""
    batch_size: Annotated[Positive, _STEPS] = 8
    """Examples a step on the device at once; several processes share them."""
    gradient_accumulation: Annotated[Positive, _STEPS] = 1
    """Batches a step; the gradient is that of all their examples as one batch."""
    max_gradient_norm: Annotated[PositiveReal | None, Flag("Steps", unset="any")] = None
    """Scale a gradient of a larger norm down to this."""
    precision: Annotated[Precision, Flag("Base model and adapter")] = "fp32"
    """The base model's numbers, fp32 or bf16; the vectors are fp32 in both."""
    quantize: Annotated[Quantisation | None, Flag("Base model and adapter", unset="no")] = None
    """Hold the base model's linear layers in few bits, int8 or nf4 of bitsandbytes, in training and for answers. All
    else stays in `precision`; for tasks that write their answers."""
    objective: Annotated[Literal["lm", "t-few"], _TASK] = "lm"
    """lm, the model's own loss, or t-few, which adds the unlikelihood of wrong labels and the length-normalised choice
    among all (Liu et al. 2022, section 3.2); for label words."""
    max_length: Annotated[Tokens, _DATA] = 128
    """Where longer inputs are cut, in tokens."""
    max_label_length: Annotated[Positive | None, Flag("Data", unset="any")] = None
    """The most tokens a label may have. Labels are never cut."""
    balance: Annotated[bool, _DATA] = False
    """Draw the same number of examples of each label in each epoch, rare ones more than once."""
    group_by_length: Annotated[bool, _STEPS] = True
    """Put examples of like length into one batch, to save padding."""
    packing: Annotated[bool, _TASK] = False
    """Put several examples into one row of `max_length`, where a causal model learns conversations or texts."""
    train_on: Annotated[Literal["all", "last"], _TASK] = "all"
    """Which of the assistant's answers in a conversation are learned: all, or the last."""
    dropout: Annotated[bool, _STEPS] = True
    """Train with the base model's own dropout. Without it the base runs in evaluation mode, where transformers doesn't
    checkpoint gradients."""
    pad_to_multiple_of: Annotated[Rounding | None, Flag("Steps", unset="1")] = None
    """Round the padded lengths of training's batches up to a multiple of this."""
    evaluate_every: Annotated[Positive | None, Flag("Evaluation", unset="each epoch")] = None
    """Evaluate after so many steps; otherwise after each epoch, or where `steps` is given, ten times. The state that an
    interrupted run goes on from is saved then, too."""
    answer_by: Annotated[AnswerBy | None, Flag("Evaluation", unset="rank")] = None
    """How label words are answered, in evaluations and by the finished adapter: rank, the likeliest label, or
    generation, what the model writes, beside which the accuracy by rank is told. Other kinds of tasks have one way
    each."""
    best_by: Annotated[Literal["accuracy", "macro_f1", "loss"] | None, Flag("Evaluation", unset="accuracy")] = None
    """What makes an evaluation the best: accuracy, macro_f1 or loss. Of equal accuracies it is that of the lower loss,
    and where the answers are free text, loss decides alone."""
    patience: Annotated[Positive | None, Flag("Evaluation", unset="never")] = None
    """Stop after so many evaluations without a better one."""
    evaluation_batch_size: Annotated[Positive, _EVALUATION] = 32
    """Examples a batch while evaluating."""
    trackers: Annotated[tuple[str, ...], Flag("Evaluation", also="tracker")] = ()
    """Where to log besides the run's folder, by accelerate's names, such as tensorboard."""
    seed: Annotated[Seed, _STEPS] = 42
    """Decides the order of the examples, the dropout, and what `limit` draws."""

    def total_steps(self, batches_an_epoch: int) -> int:
        """How many steps the training has.

        Args:
            batches_an_epoch: how many batches one pass over the examples makes.
        """
        return self.epochs * self.steps_an_epoch(batches_an_epoch) if self.steps is None else self.steps

    def steps_an_epoch(self, batches: int) -> int:
        """How many steps one pass over the examples makes; the last may have fewer batches."""
        return math.ceil(batches / self.gradient_accumulation)

    def evaluation_interval(self, batches_an_epoch: int) -> int:
        """After how many steps an evaluation is due."""
        if self.evaluate_every is not None:
            return self.evaluate_every
        if self.steps is not None:
            return max(1, self.steps // 10)
        return self.steps_an_epoch(batches_an_epoch)
