"""What a user's Trainer script does; run by test_trainer.py with peft importable or hidden.

Usage: trainer_script.py FOLDER [hide-peft]
"""

import json
import sys
from pathlib import Path

if "hide-peft" in sys.argv:
    sys.modules["peft"] = None

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.utils import is_peft_available

from builders import SEQ2SEQ, seq2seq_batch, t5
from ia3 import IA3Config, PeftModel, get_peft_model

torch.set_num_threads(1)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def dataset():
    batch = seq2seq_batch(16)
    return [{key: value[i] for key, value in batch.items()} for i in range(16)]


def trainer(folder, stop_at=None, head=False, **more):
    config = {**SEQ2SEQ, "modules_to_save": ["lm_head"]} if head else SEQ2SEQ
    model = get_peft_model(t5(tie_word_embeddings=False), IA3Config(**config))
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
    callbacks = [StopAt(stop_at)] if stop_at else []
    return Seq2SeqTrainer(model, arguments, train_dataset=dataset(), eval_dataset=dataset(), callbacks=callbacks)


def vectors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def main(folder):
    report = {"peft": is_peft_available()}
    for head in (False, True):
        whole = trainer(folder / f"whole-{head}", head=head)
        whole.train()
        trainer(folder / f"cut-{head}", stop_at=4, head=head).train()
        resumed = trainer(folder / f"cut-{head}", head=head)
        resumed.train(resume_from_checkpoint=True)
        report[f"resumed equals whole, head {head}"] = same(vectors(whole.model), vectors(resumed.model))
        report[f"trained names, head {head}"] = sorted({n.split(".")[-2] for n in vectors(whole.model)})
    checkpoint = folder / "whole-False" / "checkpoint-4"
    report["files"] = sorted(path.name for path in checkpoint.iterdir())
    report["weights bytes"] = {p.name: p.stat().st_size for p in checkpoint.glob("*.safetensors")}

    best = trainer(
        folder / "best",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,
        metric_for_best_model="loss",
        predict_with_generate=False,
    )  # "best" is the highest loss, so that it isn't the last one
    best.train()
    report["best"] = Path(best.state.best_model_checkpoint).name
    fresh = PeftModel.from_pretrained(
        t5(tie_word_embeddings=False), best.state.best_model_checkpoint, is_trainable=True
    )
    report["best loaded"] = same(vectors(best.model), vectors(fresh))

    generated = trainer(folder / "generate", predict_with_generate=True, generation_max_length=5)
    report["predict_with_generate"] = list(generated.predict(dataset()).predictions.shape)
    generated.save_model(str(folder / "final"))
    report["final files"] = sorted(path.name for path in (folder / "final").iterdir())
    print("REPORT " + json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
