"""`ia3 merge`: the base model with an adapter folded into its weights, as a folder of its own."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from ia3.cli.flags import Adapter, AsJson, TrustRemoteCode, print_json
from ia3.files import give_usual_rights
from ia3.runs.screen import Screen
from ia3.runs.tables import facts


def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base model and save both as one model, which needs no ia3."""
    from ia3.runs.run import check_output

    if output.exists():
        raise ValueError(f"{output} exists already, and a merged model replaces nothing: name a new folder.")
    check_output(output)
    progress = Screen(stderr=True)
    with progress.status(f"Loading {adapter}") as status:
        model, tokenizer = _load(adapter, trust_remote_code)
        vectors = sum(parameter.numel() for name, parameter in model.named_parameters() if ".ia3_l." in name)
        status.update("Merging")
        merged = model.merge_and_unload()
        status.update(f"Saving {output}")
        _save(merged, tokenizer, output)
    size = sum(path.stat().st_size for path in output.iterdir())
    if as_json:
        print_json({"adapter": adapter, "output": output, "merged_numbers": vectors, "bytes": size})
        return
    rows = {
        "model": f"{output} ({size:,} bytes)",
        "folded in": f"{vectors:,} numbers",
        "load it by": f'transformers.{type(merged).__name__}.from_pretrained("{output}")',
    }
    Screen().print(facts("Merged", rows), highlight=False)


def _load(adapter: str, trusted: bool) -> tuple[Any, Any]:
    """The base of any task with its adapter, and its tokenizer."""
    from transformers.utils.logging import disable_progress_bar

    from ia3 import auto
    from ia3.config import PeftConfig
    from ia3.inference.loading import base_of, load_tokenizer_of, reading_weights
    from ia3.peft_model import CLASS_FOR_TASK

    disable_progress_bar()
    config = PeftConfig.from_pretrained(adapter)
    tokenizer = load_tokenizer_of(adapter, config, trust_remote_code=trusted)
    loader: Any = getattr(auto, f"Auto{CLASS_FOR_TASK[config.task_type].__name__}")
    with reading_weights(base_of(adapter, config)):
        return loader.from_pretrained(adapter, trust_remote_code=trusted), tokenizer


def _save(model: Any, tokenizer: Any, output: Path) -> None:
    """Write the folder under a temporary name and rename it: whole or not at all."""
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.absolute().parent, prefix=f".{output.name}."))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        give_usual_rights(temporary)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
