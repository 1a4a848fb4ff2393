"""Train a model from random weights: weft pretrain --config C --data D --optimizer galore --output OUT

The options of an optimiser and of factorised weights appear in `weft pretrain --optimizer galore --method sltrain
--help`. Beneath is `weft adapt` on the model `config:C`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft import registry
from weft.cli import _flags
from weft.cli import adapt as _verb
from weft.errors import UsageError, nearest
from weft.run import adapt as _adapt
from weft.run.options import Option

_DOC = """Train a model from random weights: by a low-rank optimiser or another, with factorised weights or dense ones.

[bold]weft pretrain --config builtin:pycode --data builtin:stdlib --optimizer galore --rank 64 --output OUT[/bold]

OUT/run.yaml repeats the run. A run that was killed goes on when the same command is started again."""

_MODEL = (
    Option("config", str | None, None, "a config.json, a folder or a hub id with one, or builtin:pycode"),
    Option("tokenizer", str | None, None, "a folder or hub id with a tokenizer; none takes the config's own"),
    Option("config_options", dict[str, str] | None, None, "fields of the config: hidden_size=256,num_hidden_layers=4"),
)
_METHOD = Option("method", str, "full", "full, or the form of the weights: a name of `weft methods --pillar pretrain`")
_SETTLED = {"model": None, "method": "full", "task": "causal-lm"}  # what `weft adapt` asks and this verb answers


def build(argv: list[str]) -> Callable[..., None]:
    """The command for these words: with the options of the optimiser that they name, in a flag or in their run file."""
    path = _flags.value(argv, "--run-file")
    file = _adapt.read_run_file(path) if path else {}
    optimizer = _flags.value(argv, "--optimizer") or file.get("optimizer")
    method = str(_flags.value(argv, "--method") or file.get("method") or "full")
    known = ("full", *registry.cards("pretrain"))
    if method.partition("@")[0] not in known:
        raise UsageError(f"method {method!r} trains no model from random weights: {nearest(method, known)}")
    method = _adapt.with_optimizer(method, optimizer)
    parameters = [
        _flags.own("run_file", str | None, "YAML run file of an earlier run; flags override it.", "--run-file"),
        _flags.own("dry_run", bool | None, "Show modules, parameters and memory; train nothing.", "--dry-run"),
        _flags.resume(),
    ]
    parameters += [_flags.parameter(option, "What") for option in (*_MODEL, _METHOD)]
    parameters += [
        _flags.parameter(option, _verb.panel(option)) for option in _adapt.run_options() if option.name not in _SETTLED
    ]
    doc = _DOC
    if method == "full":
        doc += "\n\nOptions of their own: [bold]weft pretrain --optimizer NAME --help[/bold], or --method NAME"
    else:
        parameters += _verb.method_parameters(method, f"Options of {method.removeprefix('full@')}")
    return _flags.function(_run, parameters, doc)


def _run(run_file: str | None, dry_run: bool | None, resume: bool | None, **flags: Any) -> None:
    from weft.run import options
    from weft.run.models import scratch_spec

    flags = {key: value for key, value in flags.items() if value is not None}
    own = options.check("weft pretrain", list(_MODEL), {o.name: flags.pop(o.name) for o in _MODEL if o.name in flags})
    given: dict[str, Any] = {**_SETTLED, **(_adapt.read_run_file(run_file) if run_file else {}), **flags}
    if "config" in own:
        given["model"] = scratch_spec(own["config"], own.get("tokenizer"), own.get("config_options", {}))
    elif own:
        raise UsageError(f"--{next(iter(own)).replace('_', '-')} is given without --config")
    if not given["model"]:
        raise UsageError(f"--config is missing: {_MODEL[0].help}")
    _verb.go({k: v for k, v in given.items() if v is not None}, bool(dry_run), resume, "pretrain --run-file")
