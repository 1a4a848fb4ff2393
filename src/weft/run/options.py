"""The options of a method, read off its typed config: name, type, default, help; and the checking of given values.

The same list makes the command line's flags, the keys of a run file and the check before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, Union

from weft.errors import UsageError, nearest
from weft.patterns import is_regex


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a method's config that a user may set.

    `type` is the field's annotation, resolved; `default` is None where the method chooses for itself.
    """

    name: str
    type: Any
    default: Any
    help: str

    @property
    def type_name(self) -> str:
        """The type in words, for help and error messages: "int", "float or none", "one of: none, all"."""
        return _describe(self.type)


def from_config(config_class: type, hidden: frozenset[str] = frozenset()) -> list[Option]:
    """The options of a config dataclass, in the order of its fields, without those in `hidden`."""
    own = getattr(config_class, "own_fields", None)
    fields = own() if own is not None else dataclasses.fields(config_class)
    hints = _type_hints(config_class)
    options = []
    for field in fields:
        if field.name in hidden or not field.init:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING:
            default = None
        help_text = " ".join(str(field.metadata.get("help", "")).split())
        options.append(Option(field.name, hints.get(field.name, Any), default, help_text))
    return options


def _type_hints(config_class: type) -> dict[str, Any]:
    """The resolved annotations of a dataclass; a field whose annotation cannot be resolved takes any value."""
    try:
        return typing.get_type_hints(config_class)
    except (NameError, TypeError):
        return {}


def check(what: str, options: list[Option], given: dict[str, Any]) -> dict[str, Any]:
    """The given values, each turned into its option's type.

    Raises UsageError for an unknown name (with the nearest) or a value of the wrong type.
    """
    known = {option.name: option for option in options}
    checked = {}
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"{what} has no option {name!r}: {nearest(name, known)}")
        option = known[name]
        try:
            checked[name] = coerce(value, option.type)
        except (TypeError, ValueError):
            raise UsageError(f"{what}: {name} must be {option.type_name}, not {value!r}") from None
    return checked


def coerce(value: Any, annotation: Any) -> Any:
    """`value` as the annotation wants it; text from the command line or YAML is read as that type.

    Raises ValueError or TypeError where it does not fit.

    >>> coerce("8", int), coerce("1e-3", float), coerce("q_proj,v_proj", list[str])
    (8, 0.001, ['q_proj', 'v_proj'])
    """
    if annotation is Any:
        return value
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, typing.get_args(annotation))
    if origin is Literal:
        return _coerce_literal(value, typing.get_args(annotation))
    if annotation is type(None):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        raise ValueError
    if annotation is bool:
        return _coerce_bool(value)
    if annotation is int:
        return _coerce_int(value)
    if annotation is float:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    if annotation is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    return _coerce_container(value, annotation, origin or annotation)


def _coerce_union(value: Any, members: tuple[Any, ...]) -> Any:
    """The first member that fits; text is tried last as text, and where a list of text is possible, as that list."""
    if isinstance(value, str) and str in members and list[str] in members:
        if value == "all-linear" or is_regex(value):
            return value
        return coerce(value, list[str])
    order = [type(None), bool, int, float]
    ranked = sorted(
        members, key=lambda member: order.index(member) if member in order else len(order) + (member is str)
    )
    for member in ranked:
        try:
            return coerce(value, member)
        except (TypeError, ValueError):
            continue
    raise ValueError


def _coerce_literal(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    for choice in choices:
        if isinstance(value, str) and str(choice) == value:
            return choice
        # PEFT's own shorthand: 'pissa_niter_[number of iters]' stands for pissa_niter_4, pissa_niter_16, ...
        if isinstance(value, str) and isinstance(choice, str) and "[" in choice:
            stem = choice.split("[", 1)[0]
            if value.startswith(stem) and value[len(stem) :].isdigit():
                return value
    raise ValueError


def _coerce_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise TypeError


def _coerce_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError
    return int(value)


def _coerce_container(value: Any, annotation: Any, origin: type) -> Any:
    arguments = typing.get_args(annotation)
    if isinstance(value, str) and origin in (list, tuple, set, dict):
        value = _parse(value, origin)
    if origin in (list, tuple, set):
        if isinstance(value, (str, dict)) or not hasattr(value, "__iter__"):
            raise TypeError
        if origin is tuple and arguments and Ellipsis not in arguments:
            return tuple(coerce(item, member) for item, member in zip(value, arguments, strict=True))
        return origin(coerce(item, arguments[0]) if arguments else item for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError
        if not arguments:
            return value
        return {coerce(key, arguments[0]): coerce(item, arguments[1]) for key, item in value.items()}
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) and isinstance(value, dict):
        return annotation(**value)
    if isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise TypeError


def _parse(text: str, origin: type) -> Any:
    """A list or mapping from one word: YAML's own flow style, or words (`a,b`) or pairs (`a=1,b=2`) between commas."""
    import yaml

    if text.startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError from error
    if origin is dict:
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(key.strip() and middle and value.strip() for key, middle, value in pairs):
            raise ValueError
        return {key.strip(): value.strip() for key, _, value in pairs}
    return [part.strip() for part in text.split(",") if part.strip()]


def _describe(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        members = sorted(typing.get_args(annotation), key=lambda member: member is type(None))
        return " or ".join(_describe(member) for member in members)
    if origin is Literal:
        return "one of: " + ", ".join(str(choice) for choice in typing.get_args(annotation))
    if annotation is type(None):
        return "none"
    if annotation is Any:
        return "any value"
    if annotation is bool:
        return "true or false"
    if origin is not None:
        inner = ", ".join(_describe(member) for member in typing.get_args(annotation) if member is not Ellipsis)
        return f"{origin.__name__} of {inner}"
    return getattr(annotation, "__name__", str(annotation))
