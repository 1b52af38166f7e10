"""A word tokenizer for tiny causal models, with a chat template or plain, and instructions that they can learn."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ia3.tasks.examples import Example

CHATS = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> <line> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")
_SPECIAL = ("<pad>", "</s>", "<unk>", "<s>", "<system>", "<user>", "<assistant>", "<line>")
WORDS = (*_SPECIAL, *_NUMBERS, "say", "then", "please", "the", "number", "after", "be", "brief")


def tokenizer(template: str | None = CHATS, *, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; `<s>` before and `</s>` behind plain text."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>" if pad else None,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(_SPECIAL[4:]),
        chat_template=template,
    )


def examples(count: int) -> list[Example]:
    """Questions of different lengths: the number after the one that is named."""
    rows = []
    for index in range(count):
        place = index % (len(_NUMBERS) - 1)
        politeness = "please " * (index % 4)
        question = f"{politeness}say the number after {_NUMBERS[place]}"
        rows.append(Example(question, " ".join(_NUMBERS[place + 1 : place + 2 + index % 2])))
    return rows


def llama() -> LlamaForCausalLM:
    """A model for these words, the same each time."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=len(WORDS), pad_token_id=0, bos_token_id=3, eos_token_id=1)
    return LlamaForCausalLM(config)


def logits(model) -> torch.Tensor:
    """What a model answers to two rows of words, without gradients."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 10, 11, 12, 1], [3, 9, 8, 12, 1]])).logits
