"""PEFT's import path of `hotswap_adapter`."""

from ia3.hotswap import hotswap_adapter

__all__ = ["hotswap_adapter"]
