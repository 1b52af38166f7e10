"""Importing operations imports no Triton, and needs none; sizes of blocks."""

from __future__ import annotations

import subprocess
import sys

import torch

from ia3.fast.ops.launch import cdiv, compile_kernels, next_power_of_2

_CODE = """
import sys, torch


class Nothing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "triton":
            tried.append(name)
            raise ModuleNotFoundError(name)


tried = []
sys.modules.pop("triton", None)
sys.meta_path.insert(0, Nothing())
from ia3.fast.ops import attention, cross_entropy, dropout, gate, launch, norm, partials, quantise, rotary

x = torch.ones(2, 4)
print(norm.add_norm(x, x, norm.Norm(x[0], None, 0.0, False), 0.0, None, "torch")[1].sum().item(), tried)
"""


def test_a_machine_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "8.0 []"


def test_a_device_without_kernels_compiles_none() -> None:
    compile_kernels(lambda: 1 / 0, torch.device("cpu"))


def test_sizes_of_blocks() -> None:
    assert [next_power_of_2(x) for x in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert [cdiv(x, 4) for x in (1, 4, 5)] == [1, 1, 2]
