"""What a setting may be: its type, range and meaning stand at its field, and are checked here.

A class of settings is a dataclass whose fields are made by `setting`. `read_fields` turns what a
config, a file or a flag gives into their values, or says in one line what was expected. Loads
without JAX.
"""

import ast
import dataclasses
import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from univg_jax.errors import UserError, check_name, quote
from univg_jax.files import check_address

_RULE = "rule"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The meaning of a setting, and what of its type is allowed.

    `least` and `most` belong to the range, `above` and `below` do not. For a text, `least` is its
    length. `names` are all that a text may be.
    """

    help: str = ""
    least: int | float | None = None
    most: int | float | None = None
    above: int | float | None = None
    below: int | float | None = None
    names: tuple[str, ...] = ()
    none: str = ""  # what None means, where the type allows it
    unit: str = ""  # of a number
    is_path: bool = False  # a text that begins with ~ is then a path in the user's home

    def allows(self, number: int | float) -> bool:
        """Whether a number is finite and in the range."""
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    @property
    def range(self) -> str:
        """The range in words, such as `>= 0 and < 1`."""
        bounds = {">": self.above, ">=": self.least, "<": self.below, "<=": self.most}
        return " and ".join(f"{sign} {b:.15g}" for sign, b in bounds.items() if b is not None)


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    factory: Any = dataclasses.MISSING,
    **rule: Any,
) -> Any:
    """A dataclass field with its default, its meaning, and the other fields of its `Rule`.

    `factory()` makes a default that is not one value. Without either the field must be given.
    """
    metadata = {_RULE: Rule(help=help, **rule)}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def rule_of(field: dataclasses.Field) -> Rule:
    """The rule of a field; one without any if `setting` did not make it."""
    return field.metadata.get(_RULE, Rule())


def settings_of(cls: type) -> list[dataclasses.Field]:
    """The fields of a class that `setting` made."""
    return [field for field in dataclasses.fields(cls) if _RULE in field.metadata]


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field; `dataclasses.MISSING` if it must be given."""
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def read_fields(cls: type, values: object, where: str) -> dict[str, Any]:
    """The fields of `cls` that `values` gives, as their types want them.

    `values` is a mapping or an instance of `cls`, and `where` its place in the config. Raises
    UserError for an unknown name, with the nearest one, and for a value that cannot be.
    """
    fields = {field.name: field for field in settings_of(cls)}
    if isinstance(values, cls):
        values = {name: getattr(values, name) for name in fields}
    if not isinstance(values, Mapping):
        raise UserError(
            f"{where or 'config'}={quote(values)}: expected a group of the keys {', '.join(fields)}"
        )
    for name in values:
        check_name(name, fields, what=f"key of {where or 'config'}:")
    prefix = f"{where}." if where else ""
    return {
        name: read(fields[name].type, value, prefix + name, rule_of(fields[name]))
        for name, value in values.items()
    }


def make(cls: type, values: object, where: str) -> Any:
    """An instance of `cls`: what `values` gives as in `read_fields`, and defaults for the rest.

    A class may have a method `check(where)`, for what concerns several fields. Raises UserError.
    """
    read = read_fields(cls, values, where)
    for field in settings_of(cls):
        if field.name not in read and default_of(field) is dataclasses.MISSING:
            raise UserError(f"{where} has no {field.name}: it must be given")
    made = cls(**read)
    if hasattr(made, "check"):
        made.check(where)
    return made


def read(kind: Any, value: Any, where: str, rule: Rule = Rule()) -> Any:
    """`value` as the type `kind`, which may be a union, a tuple, a mapping or a dataclass.

    A whole number may be written as a float, such as 1e4. Raises UserError otherwise, with what was
    expected.
    """
    for arm in get_args(kind) if isinstance(kind, UnionType) else (kind,):
        origin, inside = get_origin(arm) or arm, get_args(arm)
        if arm is NoneType and value is None:
            return value
        if arm is Any and isinstance(value, str) and rule.names:
            return check_name(value, rule.names, what=where)
        if arm is Any:
            return value
        if dataclasses.is_dataclass(arm) and isinstance(value, arm | Mapping):
            return make(arm, value, where)
        if origin is Mapping and isinstance(value, Mapping):
            value = {os.path.expanduser(k) if rule.is_path else k: v for k, v in value.items()}
            return {k: read(inside[1], v, f"{where}.{k}", rule) for k, v in value.items()}
        if origin is tuple and isinstance(value, list | tuple) and _has_length(inside, value):
            return tuple(read(inside[0], item, where, rule) for item in value)
        if arm in (int, float) and _is_number(arm, value) and rule.allows(float(value)):
            return arm(value)
        if arm is bool and isinstance(value, bool):
            return value
        if origin is Callable and callable(value):
            return value
        if arm is str and isinstance(value, str) and len(value) >= (rule.least or 0):
            if rule.names:
                check_name(value, rule.names, what=where)
            if rule.is_path:
                check_address(value, where=f"{where}={quote(value)[1:-1]}")
            return os.path.expanduser(value) if rule.is_path else value
    raise UserError(f"{where}={quote(value)}: expected {describe(kind, rule)}")


def parse_literal(text: str) -> Any:
    """A Python literal (`true` and `false` too), or the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _has_length(inside: tuple, value: Sequence) -> bool:
    return inside[-1] is Ellipsis or len(inside) == len(value)


def _is_number(kind: type, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value) and (kind is float or bool(value == int(value)))
    except OverflowError:  # a whole number that no float can hold
        return False


def describe(kind: Any, rule: Rule) -> str:
    """What a setting of a type and a rule may be, in words."""
    if isinstance(kind, UnionType):
        return " or ".join(describe(arm, rule) for arm in get_args(kind))
    if kind is NoneType:
        return f"None ({rule.none})" if rule.none else "None"
    if kind in (int, float):
        word = "a whole number" if kind is int else "a finite number"
        return f"{word} {rule.range}".strip()
    if kind in (str, Any) and rule.names:
        return f"one of {', '.join(rule.names)}"
    if kind is str:
        return ("a path" if rule.is_path else "a text") + (", not empty" if rule.least else "")
    if get_origin(kind) is tuple:
        *items, last = get_args(kind)
        if last is Ellipsis:
            return f"a list, each {describe(items[0], rule)}"
        return f"a list of {len(items) + 1}, each {describe(last, rule)}"
    if get_origin(kind) is Mapping or dataclasses.is_dataclass(kind):
        return "a group of keys"
    return {bool: "True or False", Callable: "a function"}.get(kind, "any value")


def leaves(cls: type, where: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """The settings of `cls` and of the sections in it, with their dotted names.

    A mapping of sections has one star for its keys.
    """
    for field in dataclasses.fields(cls):
        name = f"{where}.{field.name}" if where else field.name
        inside = get_args(field.type)[-1:] if get_origin(field.type) is Mapping else (field.type,)
        if dataclasses.is_dataclass(inside[0]):
            yield from leaves(inside[0], name if inside[0] is field.type else f"{name}.*")
        else:
            yield name, field
