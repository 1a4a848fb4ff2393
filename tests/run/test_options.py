"""Options from typed configs: what text becomes, what is refused."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from weft.errors import UsageError
from weft.run.options import check, coerce, from_config


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("8", int, 8),
        ("1e-3", float, 0.001),
        (1, float, 1.0),
        ("true", bool, True),
        ("none", int | None, None),
        ("4", int | None, 4),
        ("q_proj,v_proj", list[str] | str, ["q_proj", "v_proj"]),
        ("q_proj", list[str] | str | None, ["q_proj"]),
        ("all-linear", list[str] | str, "all-linear"),
        (r".*\.(q|v)_proj", list[str] | str, r".*\.(q|v)_proj"),
        ("1,2", list[int] | int, [1, 2]),
        ("3", list[int] | int, 3),
        ("{q_proj: 4}", dict[str, int], {"q_proj": 4}),
        ("text=sentence,label=y", dict[str, str] | None, {"text": "sentence", "label": "y"}),
        ("lora_only", Literal["none", "all", "lora_only"], "lora_only"),
        ("none", Literal["none", "all"], "none"),
        ("false", bool | Literal["gaussian"], False),
        ("gaussian", bool | Literal["gaussian"], "gaussian"),
        ("pissa_niter_4", bool | Literal["pissa_niter_[number of iters]"], "pissa_niter_4"),
        ("a,b", tuple[str, ...], ("a", "b")),
        ("8", Any, "8"),
    ],
)
def test_text_becomes_what_the_type_says(text, annotation, value):
    got = coerce(text, annotation)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("2.5", int),
        (2.5, int),
        (True, int),
        (True, float),
        ("nan", float),
        ("inf", float),
        ("yes", bool),
        (3, str),
        ("some", Literal["none", "all"]),
        ("a", dict[str, int]),
        (3, list[str]),
        ("pissa_niter_x", bool | Literal["pissa_niter_[number of iters]"]),
    ],
)
def test_what_does_not_fit_is_refused(value, annotation):
    with pytest.raises((ValueError, TypeError)):
        coerce(value, annotation)


@dataclass
class Config:
    r: int = field(default=8, metadata={"help": "the  rank\nof it"})
    targets: list[str] = field(default_factory=lambda: ["q"])
    hidden: int = 0
    made: int = field(default=0, init=False)


def test_options_of_a_config():
    options = from_config(Config, frozenset({"hidden"}))
    assert [(o.name, o.default, o.help) for o in options] == [("r", 8, "the rank of it"), ("targets", ["q"], "")]
    assert [o.type_name for o in options] == ["int", "list of str"]


def test_unknown_and_wrong_options_are_named():
    options = from_config(Config)
    with pytest.raises(UsageError, match=r"toy has no option 'rr': .*'r'"):
        check("toy", options, {"rr": 1})
    with pytest.raises(UsageError, match=r"toy: r must be int, not 'x'"):
        check("toy", options, {"r": "x"})
    assert check("toy", options, {"r": "4"}) == {"r": 4}
