"""Decoding one token with an unmerged adapter against the bare base, batch 1 on the CPU, taking turns.

    python benchmarks/cpu_decode.py [--rounds 300]

flan-t5-small-titler in fp32 with a cache of 64 encoder and 8 decoder tokens; PEFT beside them.

Needs: CPU; peft; about a minute.
"""

from __future__ import annotations

import argparse
import importlib

import torch
from transformers import AutoModelForSeq2SeqLM

from bench import interleaved, summary, write
from ia3.bundled import resolve_model


def decoder(library_name: str | None, folder: str):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    if library_name is not None:
        library = importlib.import_module(library_name)
        model = library.get_peft_model(model, library.IA3Config(task_type="SEQ_2_SEQ_LM")).eval()
    source = torch.randint(2, 32000, (1, 64))
    mask = torch.ones_like(source)
    encoded = model.get_encoder()(input_ids=source, attention_mask=mask)
    given = {"encoder_outputs": encoded, "attention_mask": mask, "use_cache": True}
    cache = model(decoder_input_ids=torch.randint(2, 32000, (1, 8)), **given).past_key_values
    token = torch.tensor([[5]])

    def decode() -> None:
        model(decoder_input_ids=token, past_key_values=cache, **given)
        cache.self_attention_cache.crop(-1)

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    arguments = parser.parse_args()
    folder = resolve_model("bundled:flan-t5-small-titler")
    with torch.inference_mode():
        candidates = {
            "base": decoder(None, folder),
            "ia3, unmerged": decoder("ia3", folder),
            "peft, unmerged": decoder("peft", folder),
            "base again": decoder(None, folder),
        }
        seconds = interleaved(candidates, arguments.rounds, warmup=20)
    write("cpu_decode", {"one token, batch 1": summary(seconds, "base")})


if __name__ == "__main__":
    main()
