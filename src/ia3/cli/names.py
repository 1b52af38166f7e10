"""The names of settings on the command line: flags made from the model's fields, and flags in messages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from ia3.errors import shorten
from ia3.launched import launched_rank
from ia3.runs.screen import Screen

NumberT = TypeVar("NumberT", int, float)

_OF_PATTERNS = set("\\^$*+?()[]{}|")
_MARKED = re.compile(r"`(\w+)(?:=([^`]*))?`")
_PLAIN = re.compile(r"[\w./:-]+")


def in_flags(message: str, known: Collection[str] | None = None) -> str:
    """A message of the library in the words of the command line: "`text_column='body'`" as "--text-column body".

    Args:
        message: the message.
        known: the flags that there are; other names stay. None for all.
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found[1].replace("_", "-"), found[2]
        if known is not None and f"--{name}" not in known:
            return found[0]
        if value in (None, "True", "False"):
            return f"--no-{name}" if value == "False" else f"--{name}"
        plain = value.strip("'\"")
        return f"--{name} {plain}" if _PLAIN.fullmatch(plain) else f'--{name} "{plain}"'

    return _MARKED.sub(flag, message)


class FlagConsole(Screen):
    """Standard error, where the settings that the library's lines name are flags; of several processes the first's."""

    def __init__(self) -> None:
        super().__init__(stderr=True, quiet=launched_rank() > 0)

    def print(self, *objects: Any, **how: Any) -> None:
        super().print(*(in_flags(each) if isinstance(each, str) else each for each in objects), **how)


def module_names(value: str | None) -> list[str] | str | None:
    """A flag's names with commas between, pattern, `all-linear` or None as `IA3Config` takes it: a list, or as it is.

    Raises:
        ValueError: nothing between two commas.
    """
    if value is None or value.lower() == "all-linear" or _OF_PATTERNS & set(value):
        return value
    return parts(value)


def parts(value: str) -> list[str]:
    """What stands between a value's commas; nothing there is refused."""
    names = [name.strip() for name in value.split(",")]
    if not all(names):
        raise ValueError(
            f"{shorten(value)} has an empty name: expected names with commas between them, such as k,v,wo."
        )
    return names


def numbers(name: str, value: str, kind: type[NumberT]) -> list[NumberT]:
    """The numbers between the commas of a flag's value; all else is refused."""
    try:
        return [kind(part) for part in value.split(",")]
    except ValueError:
        what, such = ("whole numbers", "0,1,2") if kind is int else ("numbers", "0.5,0.5")
        raise ValueError(
            f"`{name}` is {shorten(value)}: expected {what} with commas between, such as {such}."
        ) from None


def with_settings(
    function: Callable[..., None],
    command: Callable[[], TyperCommand],
    *,
    several: str = "",
    without: Collection[str] = (),
) -> TyperCommand:
    """A command with a flag for each setting beside its own arguments.

    Args:
        function: what it does; the last parameter takes the settings that were given, as `make_recipe` does.
        command: whose name and documentation it has.
        several: the setting whose flag may be given several times.
        without: the settings that have no flag.
    """
    from ia3.runs.recipe import Recipe
    from ia3.runs.settings import TrainSettings, fields_of

    inherited = fields_of(TrainSettings)
    ordered = sorted(fields_of(Recipe).items(), key=lambda each: each[0] in inherited)
    fields = {name: each for name, each in ordered if name not in without}
    common = inspect.signature(_named, eval_str=True).parameters.values()
    own = [*common, *list(inspect.signature(function, eval_str=True).parameters.values())[:-1]]

    def call(**given: Any) -> None:
        named = _named(*(given.pop(each.name) for each in common))
        settings = {name: value for name in fields if (value := given.pop(name)) not in (None, [])}
        read = {name: value if name == several else _read(fields[name], value) for name, value in settings.items()}
        for name in named.keys() & read.keys():
            raise ValueError(f"There are both {named[name]} and `{name}={shorten(read[name])}`: give one of them.")
        function(**given, given=named | read)

    flags = [_flag(name, field, several=name == several) for name, field in fields.items()]
    call.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in (*own, *flags)}
    app = typer.Typer(add_completion=False)
    app.command(name=command.__name__, help=command.__doc__)(call)
    made = typer.main.get_command(app)
    assert isinstance(made, TyperCommand)
    return made


def _named(
    base: Annotated[str | None, typer.Argument(metavar="MODEL", help="The base model; or --model.")] = None,
    source: Annotated[str | None, typer.Argument(metavar="DATA", help="What to learn from; or --data.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="all-linear, t-few, peft, or a YAML file with any of these settings; flags override."),
    ] = None,
    like_peft: Annotated[bool, typer.Option("--like-peft", help="PEFT's guide: --recipe peft.")] = False,
) -> dict[str, str]:
    """What is named before the settings, as settings."""
    if recipe is not None and like_peft:
        raise ValueError(f"There are both `recipe={recipe}` and --like-peft: give one of them.")
    named = {"model": base, "data": source, "recipe": "peft" if like_peft else recipe}
    return {name: value for name, value in named.items() if value is not None}


def _flag(name: str, field: Any, *, several: bool) -> inspect.Parameter:
    """A field as a parameter that typer makes a flag of; None is "not given", whatever the help shows."""
    from ia3.runs.settings import Flag

    how = next(each for each in field.metadata if isinstance(each, Flag))
    kinds, dashed = _kinds(field.annotation), f"--{name.replace('_', '-')}"
    names = [dashed, *([f"--{how.also}"] if how.also else [])]
    choices = [str(each) for kind in kinds for each in _choices(kind)]
    number = next((word for kind, word in ((int, "integer"), (float, "number")) if kind in kinds), "text")
    shown = how.unset if field.default in (None, ()) else field.default
    option = typer.Option(
        *([f"{dashed}/--no-{name.replace('_', '-')}"] if bool in kinds else names),
        rich_help_panel=how.panel,
        help=in_flags(" ".join((field.description or "").split())) + (" Several: a run each." if several else ""),
        show_default={True: "on", False: "off"}[shown] if isinstance(shown, bool) else _written(shown),
        metavar=None if bool in kinds else "|".join(choices) or number.upper(),
    )
    kind: Any = bool | None if bool in kinds else list[str] | None if several or tuple in kinds else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _written(value: Any) -> Any:
    if value is None or repr(value) == "PydanticUndefined":
        return False
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kinds(annotation: Any) -> list[Any]:
    """The types that a field takes, lists and tuples without what they hold."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for each in get_args(annotation) for kind in _kinds(each)]
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    return [get_origin(annotation) if get_origin(annotation) in (list, tuple) else annotation]


def _choices(kind: Any) -> list[Any]:
    """The values of a closed set; none of another type."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return list(kind) if isinstance(kind, type) and issubclass(kind, Enum) else []


def _read(field: Any, value: Any) -> Any:
    """A flag's value as the field takes it: lists are names with commas between."""
    kinds = _kinds(field.annotation)
    if tuple in kinds:
        return [name for each in value for name in parts(each)]
    if list in kinds:
        return module_names(value)
    return Path(value) if Path in kinds else value


class LateCommand(TyperCommand):
    """A command that its callback makes when it is called for, since importing the settings takes a while."""

    @cached_property
    def made(self) -> TyperCommand:
        """The whole command, with its flags."""
        assert self.callback is not None
        command: TyperCommand = self.callback()
        return command

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        return self.made.make_context(*arguments, **more)
