"""What one types in the same way for several commands: module names, and the way of answering."""

from __future__ import annotations

ANSWER_BY_HELP = "rank: the likeliest label; generation: what the model writes."

_OF_PATTERNS = set("\\^$*+?()[]{}|")


def module_names(value: str | None) -> list[str] | str | None:
    """Read a flag that names modules.

    Args:
        value: names with commas between them, a pattern, `all-linear`, or None where the flag wasn't given.

    Returns:
        What `IA3Config` takes: a list of names, or a pattern as it is.

    Raises:
        ValueError: nothing between two commas.
    """
    if value is None or value == "all-linear" or _OF_PATTERNS & set(value):
        return value
    names = [name.strip() for name in value.split(",")]
    if not all(names):
        raise ValueError(f"{value!r} has an empty name: expected names with commas between them, such as k,v,wo.")
    return names
