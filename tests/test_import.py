"""What importing costs, in fresh interpreters."""

import subprocess
import sys

import pytest

import ia3


def _python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def _least_seconds(first: str, second: str) -> tuple[float, float]:
    """Of the processor's time for one import and for another behind it; what stops the machine stops both."""
    code = f"from time import process_time as t; a = t(); {first}; b = t(); {second}; print(b - a, t() - b)"
    one, other = zip(*(map(float, _python(code)) for _ in range(3)), strict=True)
    return min(one), min(other)


def test_importing_loads_the_standard_library_alone():
    code = (
        "import sys; before = {*sys.modules}; import ia3; dir(ia3); ia3.__version__\n"
        "print(*{name.partition('.')[0] for name in {*sys.modules} - before} - sys.stdlib_module_names)"
    )
    assert _python(code) == ["ia3"]


def test_importing_is_quick():
    """About a third of what asyncio takes."""
    own, others = _least_seconds("import ia3", "import asyncio")
    assert own < 2 * others


def test_the_facade_costs_little_more_than_torch():
    torchs, own = _least_seconds("import torch", "from ia3 import get_peft_model")
    assert own < torchs / 2
    code = "import sys; from ia3 import get_peft_model; print({'transformers', 'huggingface_hub'} & {*sys.modules})"
    assert _python(code) == ["set()"]


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
