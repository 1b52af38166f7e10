"""What importing costs, in fresh interpreters."""

import statistics
import subprocess
import sys

import pytest

import ia3

_HEAVY = "torch", "transformers", "huggingface_hub", "safetensors", "numpy"


def _python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_loads_nothing_heavy():
    code = f"import sys, ia3; dir(ia3); ia3.__version__; print(*[m for m in {_HEAVY!r} if m in sys.modules])"
    assert _python(code) == []


def test_importing_is_quick():
    code = "import time; a = time.perf_counter(); import ia3; print(time.perf_counter() - a)"
    assert statistics.median(float(_python(code)[0]) for _ in range(5)) < 0.15


def test_the_facade_costs_little_more_than_torch():
    code = (
        "import sys, time; a = time.perf_counter(); import torch; b = time.perf_counter()\n"
        "from ia3 import get_peft_model; c = time.perf_counter()\n"
        "print(b - a, c - b, *[m for m in ('transformers', 'huggingface_hub') if m in sys.modules])"
    )
    runs = [_python(code) for _ in range(3)]
    assert all(len(run) == 2 for run in runs), runs
    assert statistics.median(float(run[1]) for run in runs) < 0.5


def test_the_config_needs_no_torch():
    code = "import sys; from ia3 import IA3Config; IA3Config(target_modules=['k']); print('torch' in sys.modules)"
    assert _python(code) == ["False"]


def test_every_public_name_is_there():
    assert set(dir(ia3)) == set(ia3.__all__)
    for name in ia3.__all__:
        assert getattr(ia3, name) is getattr(ia3, name), name


def test_unknown_attribute():
    with pytest.raises(AttributeError, match=r"'ia3' has no attribute 'get_peft_modell'.*'IA3Config'"):
        _ = ia3.get_peft_modell
    with pytest.raises(ImportError):
        exec("from ia3 import get_peft_modell")
