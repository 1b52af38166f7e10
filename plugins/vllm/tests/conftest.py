from __future__ import annotations

from importlib.util import find_spec

# `make test` has no vLLM; `make test-vllm` runs everything here.
collect_ignore = [] if find_spec("vllm") else ["engine"]
