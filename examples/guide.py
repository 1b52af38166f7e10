"""PEFT's IA3 guide for sequence-to-sequence models, step by step: a sentiment word for a financial sentence.

    python examples/guide.py --library ia3
    python examples/guide.py --library peft --data financial_phrasebank --model bigscience/mt0-large

Only the import line differs between the two libraries. With the same seed both see the same batches.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    default_data_collator,
    get_linear_schedule_with_warmup,
)

from ia3.bundled import resolve_model
from ia3.data.loading import load_examples
from ia3.inference.predict import count_truncated

LABEL_LENGTH = 3


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=["ia3", "peft"], default="ia3", help="the name in the import line")
    parser.add_argument("--model", default="bundled:flan-t5-small-titler", help="bundled, hub name or folder")
    parser.add_argument("--data", default="bundled:tweets", help="bundled, hub name or file")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--output", default="runs/guide", help="where the adapter is saved")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--padding", choices=["max_length", "longest"], default="max_length")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--limit", type=int, help="use only so many rows, drawn at random")
    parser.add_argument("--steps", type=int, help="stop after so many steps; the schedule stays that of all")
    parser.add_argument("--losses", type=Path, help="write every step's loss and the predictions as JSON")
    return parser.parse_args(argv)


def read_dataset(arguments: argparse.Namespace) -> Any:
    """The labelled sentences as a `datasets.Dataset` with class names, split 90 to 10."""
    examples = load_examples(arguments.data, text_column=arguments.text_column, label_column=arguments.label_column)
    print(examples.describe())
    features = Features(
        {"sentence": Value("string"), "label": ClassLabel(names=list(examples.labels))},
    )
    rows = list(examples)
    if arguments.limit is not None:
        rows = random.Random(arguments.seed).sample(rows, min(arguments.limit, len(rows)))
    dataset = Dataset.from_dict(
        {"sentence": [row.text for row in rows], "label": [row.label for row in rows]}, features=features
    )
    dataset = dataset.train_test_split(test_size=0.1, seed=arguments.seed)
    classes = dataset["train"].features["label"].names
    return dataset.map(lambda x: {"text_label": [classes[label] for label in x["label"]]}, batched=True)


def tokenise(dataset: Any, tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """Input ids, attention mask and labels of each row; padding in the labels is not learnt."""

    def preprocess(examples: dict[str, list[str]]) -> dict[str, Any]:
        padding = "max_length" if arguments.padding == "max_length" else False
        model_inputs = tokenizer(
            examples["sentence"], max_length=arguments.max_length, padding=padding, truncation=True
        )
        labels = tokenizer(examples["text_label"], max_length=LABEL_LENGTH, padding="max_length", truncation=True)[
            "input_ids"
        ]
        model_inputs["labels"] = [
            [-100 if token == tokenizer.pad_token_id else token for token in row] for row in labels
        ]
        return dict(model_inputs)

    sentences = [*dataset["train"]["sentence"], *dataset["test"]["sentence"]]
    cut = count_truncated(sentences, tokenizer, arguments.max_length)
    print(f"{cut} of {len(sentences)} sentences are cut to {arguments.max_length} tokens")
    columns = dataset["train"].column_names
    return dataset.map(preprocess, batched=True, remove_columns=columns, load_from_cache_file=False)


def train_epoch(model: Any, batches: Any, optimizer: Any, schedule: Any, device: str, steps: int | None) -> list[float]:
    """One pass over the training batches, or `steps` of it; each step's loss."""
    model.train()
    losses = []
    for batch in tqdm(batches, desc="train"):
        if steps is not None and len(losses) >= steps:
            break
        loss = model(**{k: v.to(device) for k, v in batch.items()}).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def evaluate(model: Any, batches: Any, tokenizer: Any, device: str) -> tuple[float, list[str]]:
    """The mean loss of the held-out batches, and the likeliest words given the true ones before them."""
    model.eval()
    losses, predictions = [], []
    for batch in tqdm(batches, desc="evaluate"):
        with torch.no_grad():
            outputs = model(**{k: v.to(device) for k, v in batch.items()})
        losses.append(outputs.loss.item())
        tokens = outputs.logits.argmax(-1).cpu().numpy()
        predictions.extend(tokenizer.batch_decode(tokens, skip_special_tokens=True))
    return sum(losses) / len(losses), predictions


def perplexity(loss: float) -> float:
    return torch.tensor(loss).exp().item()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    library = importlib.import_module(arguments.library)
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    model_name = resolve_model(arguments.model)

    # Data.
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    dataset = read_dataset(arguments)
    processed = tokenise(dataset, tokenizer, arguments)
    collate = default_data_collator
    if arguments.padding == "longest":
        collate = DataCollatorForSeq2Seq(tokenizer, padding="longest")
    order = torch.Generator().manual_seed(arguments.seed)
    train_batches = DataLoader(
        processed["train"], arguments.batch_size, shuffle=True, collate_fn=collate, generator=order
    )
    eval_batches = DataLoader(processed["test"], arguments.batch_size, collate_fn=collate)

    # Model.
    model = AutoModelForSeq2SeqLM.from_pretrained(model_name, dtype=dtype)
    model = library.get_peft_model(model, library.IA3Config(task_type="SEQ_2_SEQ_LM")).to(device)
    model.print_trainable_parameters()

    # Training.
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    schedule = get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=0, num_training_steps=len(train_batches) * arguments.epochs
    )
    torch.manual_seed(arguments.seed)  # dropout
    result: dict[str, Any] = {"train_losses": [], "eval_losses": [], "accuracies": []}
    truth = list(dataset["test"]["text_label"])
    for epoch in range(arguments.epochs):
        left = None if arguments.steps is None else arguments.steps - len(result["train_losses"])
        if left == 0:
            break
        losses = train_epoch(model, train_batches, optimizer, schedule, device, left)
        result["train_losses"] += losses
        eval_loss, predictions = evaluate(model, eval_batches, tokenizer, device)
        train_loss = sum(losses) / len(losses)
        correct = sum(p.strip() == t.strip() for p, t in zip(predictions, truth, strict=True))
        accuracy = correct / len(truth)
        print(
            f"epoch {epoch}: train loss {train_loss:.4f}, perplexity {perplexity(train_loss):.4f}; "
            f"eval loss {eval_loss:.4f}, perplexity {perplexity(eval_loss):.4f}; accuracy {accuracy:.2%}"
        )
        result["eval_losses"].append(eval_loss)
        result["accuracies"].append(accuracy)
        result["predictions"] = predictions

    # Saving, loading, and one word.
    model.save_pretrained(arguments.output)
    model = library.AutoPeftModelForSeq2SeqLM.from_pretrained(arguments.output, dtype=dtype).to(device)
    model.eval()
    sentence = dataset["test"]["sentence"][min(15, len(truth) - 1)]
    inputs = tokenizer(sentence, return_tensors="pt").to(device)
    with torch.no_grad():
        tokens = model.generate(input_ids=inputs["input_ids"], max_new_tokens=10)
    result |= {"sentence": sentence, "word": tokenizer.batch_decode(tokens, skip_special_tokens=True)[0]}
    print(f"{result['sentence']} -> {result['word']}")
    if arguments.losses is not None:
        arguments.losses.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
