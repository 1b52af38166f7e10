"""Whatever of a base is loaded, transformers loads it here: none of a base's code runs unless it is asked for.

Left to itself, transformers asks on standard input whether a base's code may run, and an adapter names its base. A
damaged folder makes it raise nearly anything; what comes out of here is an error that names the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ia3.documents import read_json
from ia3.errors import fit_screen, naming, shorten
from ia3.files import HUB_ARGUMENTS

# The fields of a configuration that may name a package of code on the hub.
_IMPLEMENTATIONS = {
    f"{before}{kind}_implementation{behind}"
    for before, behind in (("", ""), ("_", ""), ("_", "_internal"))
    for kind in ("attn", "experts")
}
# More layers than any model has; transformers makes each before it looks at the weights.
_MOST_LAYERS = 2000
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".msgpack", ".h5")


def load_pretrained(auto_class: Any, source: str | Path, *, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(source)`, of a configuration, a tokenizer or a model.

    Args:
        auto_class: the class.
        source: a folder or a hub repository.
        trust_remote_code: run code that comes with it.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        OSError: there is no such folder or repository, or a file of it is missing or unreadable.
        ImportError: it needs a package that is not installed.
        ValueError: it comes with code, and `trust_remote_code` is False, or it is damaged.
    """
    if _is_of(auto_class, "transformers"):  # classes of others don't know the argument, nor do they run code
        kwargs["trust_remote_code"] = trust_remote_code
    with _reading(source):
        if not trust_remote_code and "gguf_file" not in kwargs and "Tokenizer" not in auto_class.__name__:
            _check_configuration(source, {key: kwargs[key] for key in HUB_ARGUMENTS & kwargs.keys()})
        loaded = auto_class.from_pretrained(source, **kwargs)
        if "Tokenizer" in auto_class.__name__ and not isinstance(loaded.model_max_length, int | float):
            raise _RefusedError(
                f"{source} has {shorten(loaded.model_max_length)} as its tokenizer's model_max_length, no number."
            )
        return loaded


def make_model(kind: Any, config: Any, *, trust_remote_code: bool = False) -> Any:
    """A model of a configuration that was loaded, without its weights.

    Args:
        kind: an automatic class or a model's own.
        config: the configuration.
        trust_remote_code: run the code that it names.

    Raises:
        ValueError: a configuration that makes no model, or that names code, and `trust_remote_code` is False.
    """
    with _reading(getattr(config, "name_or_path", "") or type(config).__name__):
        if hasattr(kind, "_model_mapping"):  # an automatic class
            return kind.from_config(config, trust_remote_code=trust_remote_code)
        return kind(config)


def _is_of(kind: type, package: str) -> bool:
    return any(each.__module__.partition(".")[0] == package for each in kind.__mro__)


class _RefusedError(ValueError):
    """What this module refuses itself; its message is the whole one."""


@contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """Let an error name what was read and say what to do."""
    try:
        with naming(source):
            yield
    except (OSError, ImportError) as error:
        if isinstance(error, FileNotFoundError) or str(source) in str(error):
            raise
        kind = ImportError if isinstance(error, ImportError) else OSError
        raise kind(f"{source}: {error}") from error
    except _RefusedError as error:
        raise ValueError(str(error)) from error
    except (KeyboardInterrupt, GeneratorExit, SystemExit):
        raise
    except BaseException as error:  # a tokenizer's panic is no Exception
        from safetensors import SafetensorError
        from torch import OutOfMemoryError

        if isinstance(error, OutOfMemoryError):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{source} comes with code of its own, which isn't run unasked. If you have read it and trust it, give "
                "`trust_remote_code=True`."
            ) from error
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            raise
        if isinstance(error, ValueError):
            raise ValueError(fit_screen(str(error))) from error
        weights = "weights of the " if isinstance(error, SafetensorError | RuntimeError) else ""
        raise ValueError(
            f"The {weights}base model {str(source)!r} cannot be read: copy or download it again. "
            f"{type(error).__name__}: {fit_screen(str(error), 300)}"
        ) from error


def _check_configuration(source: str | Path, hub: Mapping[str, Any]) -> None:
    """Refuse a configuration that names code elsewhere, or a model that nothing could hold."""
    from transformers import PreTrainedConfig

    if Path(source).is_dir() and (Path(source) / "config.json").exists():
        content: Any = read_json(Path(source) / "config.json", finite=False)
    else:
        content, _ = PreTrainedConfig.get_config_dict(source, **hub)
    for part in _parts(content):
        for name in _IMPLEMENTATIONS & part.keys():
            implementations = part[name]
            named = implementations.values() if isinstance(implementations, dict) else [implementations]
            if any(isinstance(each, str) and "/" in each for each in named):
                raise _RefusedError(
                    f"{source} asks for the kernels {shorten(implementations)} of the hub, which are code. If you "
                    "trust them, give `trust_remote_code=True`."
                )
        for name, value in part.items():
            if name.endswith(("layer", "layers")) and isinstance(value, int) and value > _MOST_LAYERS:
                raise ValueError(f"{source} has {shorten(value)} as its {name}: its config.json is damaged.")
    _check_size(source, content)


def _parts(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration and those of the models in it."""
    yield content
    for value in content.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def _check_size(source: str | Path, content: Mapping[str, Any]) -> None:
    """Refuse a model whose embeddings alone are far larger than all that the folder holds."""
    files = [path for path in Path(source).glob("*") if path.suffix in _WEIGHTS] if Path(source).is_dir() else []
    held = sum(path.stat().st_size for path in files if path.is_file())
    for part in _parts(content):
        width = next((part[name] for name in ("hidden_size", "d_model", "n_embd") if name in part), 1)
        sides = (part.get("vocab_size"), width)
        numbers = [side * width for side in sides if isinstance(side, int) and isinstance(width, int)]
        # Half a byte a number is the least that a file may hold; what a head lacks is some millions.
        if files and max(numbers, default=0) > 8 * held + (64 << 20):
            raise ValueError(
                f"{source} is a model with {max(numbers):,} numbers in one matrix, by its config.json, and its weights "
                f"have {held:,} bytes: one of the two is damaged."
            )
