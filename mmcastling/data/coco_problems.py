"""What the parts of the COCO check share: the error, the list of problems, helpers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class CocoFormatError(ValueError):
    """An annotation file is not usable; the message lists the first problems."""


class Problems:
    """Keeps the first few messages and counts the rest."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.messages: list[str] = []
        self.count = 0

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.messages) < self.limit:
            self.messages.append(message)

    def raise_if_any(self, path: Path) -> None:
        if not self.count:
            return
        lines = "\n".join(f"  - {message}" for message in self.messages)
        rest = self.count - len(self.messages)
        more = f"\n  ... and {rest} more" if rest else ""
        noun = "problem" if self.count == 1 else "problems"
        raise CocoFormatError(f"{path} has {self.count} {noun}:\n{lines}{more}")


def has_keys(entry: Any, keys: Sequence[str], where: str, problems: Problems) -> bool:
    if not isinstance(entry, dict):
        problems.add(f"{where} is a {kind_of(entry)}; expected an object. Remove it.")
        return False
    missing = [key for key in keys if key not in entry]
    if missing:
        hint = "Export the file in COCO's instance format."
        if missing == ["iscrowd"]:
            hint = "Write 0; the evaluation fails without it."
        problems.add(
            f"{where} (id {entry.get('id')!r}) has no {', '.join(missing)}; expected "
            f"the keys {', '.join(keys)}. {hint}"
        )
    return not missing


def is_new_id(
    identity: Any, known: Mapping, where: str, kind: str, problems: Problems
) -> bool:
    if not isinstance(identity, int | str):
        problems.add(
            f"{where} has id {identity!r}; expected an integer. Renumber the entries."
        )
        return False
    if identity in known:
        problems.add(
            f"{where} repeats {kind} id {identity!r}; expected each once. Remove one, "
            "or renumber it together with the annotations that mean it."
        )
        return False
    return True


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; a bool is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value - value == 0


def kind_of(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean"}
    return "null" if value is None else kinds.get(type(value), "number")


def some_of(values: Iterable[Any], limit: int = 5, noun: str = "") -> str:
    values = list(values)
    shown = ", ".join(repr(value) for value in values[:limit])
    rest = len(values) - limit
    return (
        f"{shown} and {rest} more" if rest > 0 else shown or f"no {noun or 'entries'}"
    )
