"""(IA)³ adapters in vLLM's adapter slots: `vllm serve BASE --enable-lora` with this package installed serves them.

Reading adapters (`reading`, `slices`, `content`) needs no vLLM; `layers`, `manager` and `engine` are its extensions.
"""

from __future__ import annotations

TESTED = ("0.32",)
"""The releases of vLLM whose inner names this package was tested with."""


def register() -> None:
    """Make vLLM serve (IA)³ adapters in this process; its entry point, called in each process and maybe again.

    Raises:
        RuntimeError: another release of vLLM.
    """
    import vllm

    if not vllm.__version__.startswith(tuple(f"{release}." for release in TESTED)):
        raise RuntimeError(
            f"ia3-vllm extends vLLM {' and '.join(TESTED)}, by names that change with each release; this is "
            f"{vllm.__version__}. Install one of those, or another release of ia3-vllm, or leave the plugin out with "
            "VLLM_PLUGINS."
        )
    from ia3_vllm import engine, layers, manager

    layers.install()
    manager.install()
    engine.install()
