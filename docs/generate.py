"""Write the pages that follow from the code: python docs/generate.py

Into docs/generated: one page a method, the table of methods, what each can be attached to, the references of Python and
of the command line, and the results. Everything is read off the registry, the docstrings, the typed configs and the
result files, so a new method's file has its page without an edit anywhere.

    python docs/generate.py             write the pages; exit with 1 where something public is undocumented
    python docs/generate.py --readme    write README.md's table of methods and src/weft/run/evidence.json as well
    python docs/generate.py --check     exit with 1 where one of these is out of date
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

import docstrings  # noqa: E402
import guide  # noqa: E402
from docstrings import markdown, prose  # noqa: E402

import weft  # noqa: E402
from weft.run import evidence  # noqa: E402
from weft.run.distil import learns  # noqa: E402

GENERATED = DOCS / "generated"
MARKERS = ("<!-- methods: python docs/generate.py --readme -->", "<!-- /methods -->")

PILLARS = {  # as headings
    "adapters": "Adapters",
    "compress": "Compression",
    "optim": "Optimisers",
    "pretrain": "Factorised weights",
}

QUANTITY = re.compile(r"|–|[*−]*\d[\d.,]*( ± \d[\d.]*)?(×|[ \N{NO-BREAK SPACE}](%|points|[kMGT]?i?B|[mµ]?s))?[*]*")

EXPORTS = {
    "exact": "A plain LoRA gives the same outputs.",
    "bounded": "A plain LoRA approximates it; the error is printed.",
    "refused": "It has no plain LoRA form; export it merged.",
}
RECIPE = {
    "learning_rate": "learning rate",
    "weight_decay": "weight decay",
    "warmup_ratio": "share of steps in warm-up",
    "max_grad_norm": "largest norm of the gradient",
    "lr_scheduler_type": "schedule",
}
REASONS = {
    "exports": "why it leaves so",
    "groups": "why not one layer after the other",
    "leaves": "why other layers stay",
    "file": "what its file carries beside what is trained",
    "init_drift": "why not zero",
    "warm_steps": "why it takes so long",
}


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, columns of numbers flush right; a bar inside a cell is written as an entity."""
    rules = ["---:" if all(map(QUANTITY.fullmatch, column)) else "---" for column in zip(*rows, strict=True)]
    lines = [headings, rules or ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "&#124;") for cell in line) + " |" for line in lines)


# --- methods ----------------------------------------------------------------------------------------------------------


def title(slug: str) -> tuple[str, str]:
    """The method's name as its paper writes it, and what follows the colon in the first line of its file."""
    name, _, rest = (weft.registry.load(slug).__doc__ or slug).strip().split("\n")[0].partition(": ")
    return name.rstrip("."), rest


def paper(card: weft.Card) -> str:
    """The paper as a link."""
    return f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else prose(card.title)


def methods_table(link: str) -> str:
    """A table a pillar, one row a method; `link` is where a method's name leads, with {slug} and {pillar}."""
    return "\n\n".join(f"**{name}**\n\n{_pillar_table(pillar, link)}" for pillar, name in PILLARS.items())


def _pillar_table(pillar: str, link: str) -> str:
    rows = []
    for slug, card in sorted(weft.cards(pillar).items()):
        name = f"[`{slug}`]({link.format(slug=slug, pillar=card.pillar)})"
        last = card.exports if pillar == "adapters" else ", ".join(card.needs) or "nothing"
        rows.append([name, prose(card.summary), paper(card), last])
    return table(["method", "what it is", "paper", "as LoRA" if pillar == "adapters" else "needs"], rows)


def readme(text: str) -> str:
    """README.md with its table of methods up to date."""
    before, start, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not start or not end:
        raise SystemExit(f"README.md has lost its markers {MARKERS[0]!r} and {MARKERS[1]!r}")
    return before + start + "\n" + methods_table("src/weft/{pillar}/{slug}.py") + "\n" + end + after


def method_page(slug: str) -> str:
    """Everything known of one method."""
    card, module = weft.card(slug), weft.registry.load(slug)
    name, idea = title(slug)
    rest = inspect.cleandoc(module.__doc__ or "").partition("\n\n")[2]
    parts = [
        f"# {name}",
        f"*{prose(idea.rstrip('.'))}.*\n{{ .lead }}" if idea else "",
        f"`{slug}` · {paper(card)} ({card.year}) · source: `src/weft/{card.pillar}/{slug}.py`",
        _limits(card),
        "## The method",
        markdown(rest or card.summary),
        "## Use it",
        _usage(slug, card),
        "## Options",
        _options(slug),
        *(["## Recipe", _recipe(card)] if card.pillar != "compress" else []),
        "## What to expect",
        _facts(card),
        "## Where it works" if card.pillar == "adapters" else "",
        _where(slug) if card.pillar == "adapters" else "",
        *_measured(slug),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _recipe(card: weft.Card) -> str:
    if card.pillar == "optim":
        rows = [[RECIPE.get(key, key), f"`{value}`"] for key, value in card.recipe.items()]
        lead = "What suits it; `weft.optim.for_trainer` takes its learning rate and weight decay where nothing is said."
        return lead + "\n\n" + table(["setting", "value"], rows)
    if not card.recipe:
        return "It has none of its own: it trains as PEFT's LoRA does."
    rows = [[RECIPE.get(key, key), f"`{value}`"] for key, value in card.recipe.items()]
    lead = (
        "What [`weft adapt`](../reference/cli.md) and [`weft compare`](../howto/choose.md) take where nothing is said."
    )
    return lead + "\n\n" + table(["setting", "value"], rows)


def _limits(card: weft.Card) -> str:
    return '!!! note "Before you choose it"\n    ' + prose(card.limitations) if card.limitations else ""


def _usage(slug: str, card: weft.Card) -> str:
    if card.pillar == "compress":
        data = ", data=batches" if card.needs else ""
        flag = " --data builtin:stdlib" if card.needs or learns(slug) else ""
        value = getattr(weft.config_class(slug)(), card.knob)
        return (
            f"```python\nimport weft\n\nweft.compress(model, {slug!r}, {card.knob}={value}{data})\n"
            'model.save_pretrained("smaller")\n```\n\n'
            f"```sh\nweft compress --model builtin:pycode{flag} \\\n    --method {slug} "
            f"--{card.knob.replace('_', '-')} {value} --output runs/{slug}\n```"
        ).replace(repr(slug), f'"{slug}"')
    if card.pillar == "optim":
        value = getattr(weft.config_class(slug)(), card.knob) if card.knob else None
        chosen = f"{slug!r}, model" + ("" if value is None else f", {card.knob}={value}")
        chosen += ", batches=batches" * ("batches" in card.needs)
        return (
            "```python\nimport weft.optim\n\n"
            f"optimizer = weft.optim.optimizer({chosen})  # in a loop of your own\n\n"
            f"made = weft.optim.for_trainer({chosen})  # with Hugging Face's Trainer\n"
            "trainer = Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=made)\n```\n\n"
            f"```sh\n{_stepped(slug, card)} --output runs/{slug}\n```"
        ).replace(repr(slug), f'"{slug}"')
    if card.pillar == "pretrain":
        sized = f", {card.knob}={getattr(weft.config_class(slug)(), card.knob)}" if card.knob else ""
        return (
            f'```python\nimport weft\n\nweft.reparametrise(model, "{slug}"{sized})\n```\n\n'
            "```sh\nweft pretrain --config builtin:pycode --data builtin:stdlib \\\n"
            f"    --method {slug} --output runs/{slug}\n```"
        )
    config = weft.config_class(slug).__name__
    lines = ["import weft", "from peft import get_peft_model", "", f"config = weft.{config}()"]
    if card.needs:
        lines.append(f"weft.prepare(model, config, {', '.join(f'{need}={need}' for need in card.needs)})")
    lines.append("model = get_peft_model(model, config)")
    command = f"weft adapt --model builtin:pycode --data builtin:pydocs \\\n    --method {slug}"
    command += " --quality 0.5" * ("quality" in card.needs) + f" --output runs/{slug}"
    return "```python\n" + "\n".join(lines) + f"\n```\n\n```sh\n{command}\n```"


def _stepped(slug: str, card: weft.Card) -> str:
    """The command that trains by an optimiser what its recipe is for."""
    if card.pretraining:
        return f"weft pretrain --config builtin:pycode --data builtin:stdlib \\\n    --optimizer {slug}"
    trains = "peft:lora" if "a LoRA on the model" in card.needs else "full"
    return f"weft adapt --model builtin:pycode --data builtin:pydocs \\\n    --method {trains} --optimizer {slug}"


def _options(slug: str) -> str:
    """The method's own options, then those that it shares with the other methods of its pillar."""
    from weft.adapters._config import AdapterConfig
    from weft.compress._config import CompressConfig
    from weft.optim._config import OptimConfig
    from weft.pretrain._config import PretrainConfig
    from weft.run.options import from_config

    pillar, every = weft.card(slug).pillar, from_config(weft.config_class(slug))
    common, what = {
        "adapters": (AdapterConfig, "Where it attaches: the options that all adapters share"),
        "compress": (CompressConfig, "How much, of what: the options that all compression methods share"),
        "optim": (OptimConfig, "Adam's own: the options that all optimisers share"),
        "pretrain": (PretrainConfig, "Where: the options that all forms of weights share"),
    }[pillar]
    shared = {option.name for option in from_config(common)}
    own = [option for option in every if option.name not in shared]
    where = [option for option in every if option.name in shared]
    parts = [_option_table(own)] if own else ["It has none of its own."]
    if where:
        indented = _option_table(where).replace("\n", "\n    ")
        parts.append(f'??? info "{what}"\n    {indented}')
    return "\n\n".join(parts)


def _option_table(options: list[Any]) -> str:
    rows = []
    for option in options:
        name = f"`{option.name}`<br><small>{prose(option.type_name)}</small>"
        rows.append([name, f"`{_shown(option.default)}`", prose(option.help)])
    return table(["option", "default", ""], rows)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _facts(card: weft.Card) -> str:
    reasons = [[REASONS.get(key, f"why {key.replace('_', ' ')}"), prose(text)] for key, text in card.reasons.items()]
    if card.pillar == "compress":
        from weft.compress._factoriser import factoriser

        kinds = factoriser(card.slug, weft.config_class(card.slug)()).kinds
        made = " or ".join(f"`{kind}`" for kind in kinds)
        facts = [["each layer becomes", made], ["it needs", ", ".join(card.needs) or "nothing"]]
        return table(["", ""], facts + reasons)
    if card.pillar == "optim":
        size = f"`{card.knob}`" if card.knob else "the model and its adapter"
        facts = [["its state's size is set by", size], ["it needs", ", ".join(card.needs) or "nothing"]]
        return table(["", ""], facts + reasons)
    if card.pillar == "pretrain":
        size = f"`{card.knob}`" if card.knob else "the model, as long as it trains"
        return table(["", ""], [["its size is set by", size], *reasons])
    low, high = card.init_drift
    start = "ΔW is exactly zero." if high == 0 else f"|ΔW| is between {low:g} and {high:g} of |W|."
    facts = [
        ["at the start", start],
        ["everything learns within", f"{card.warm_steps} optimiser step" + "s" * (card.warm_steps != 1)],
        ["its size is set by", f"`{card.knob}`" if card.knob else "nothing: it has one size"],
        ["before attaching it needs", ", ".join(f"`{need}`" for need in card.needs) or "nothing"],
        ["as a plain LoRA", f"{card.exports}. {EXPORTS.get(card.exports, '')}"],
    ]
    return table(["", ""], facts + reasons)


# --- where a method can be attached -----------------------------------------------------------------------------------


def _where(slug: str) -> str:
    rows = [[cell, answer] for cell, answer in attachments(slug).items()]
    return (
        table(["weight", ""], rows)
        + "\n\nEvery **yes** is held to [the laws](../contributing.md#the-laws) by a test; a refusal is an error with "
        "that sentence, raised before training."
    )


@functools.cache
def attachments(slug: str) -> dict[str, str]:
    """For each kind of weight that the laws are tried on: "yes", or the sentence of the refusal."""
    contracts = str(ROOT / "tests" / "contracts")
    if contracts not in sys.path:
        sys.path.append(contracts)
    import harness
    import specimens

    found = {}
    for cell in specimens.CELLS:
        try:
            harness.attach(slug, cell)
            found[cell.name] = "yes"
        except weft.UsageError as error:
            found[cell.name] = "no: " + prose(weft.card(slug).refuses.get(cell.kind) or str(error))
    # needs a quantisation library to be tried; the laws do where there is one
    refused = weft.card(slug).refuses.get("quantised Linear")
    found["quantised Linear"] = "no: " + prose(refused) if refused else "yes"
    return found


def _kinds_matrix(slugs: list[str]) -> str:
    answers = {slug: attachments(slug) for slug in slugs}
    kinds = list(next(iter(answers.values())))
    rows = [
        [f"[`{slug}`]({slug}.md)", *("yes" if answer[kind] == "yes" else "no" for kind in kinds)]
        for slug, answer in answers.items()
    ]
    return table(["", *kinds], rows)


def index_page() -> str:
    """All methods."""
    lead = "Every method is one file, and its file's name is its name everywhere."
    parts = ["# Methods", lead, methods_table("{slug}.md")]
    adapters = sorted(weft.cards("adapters"))
    if adapters:
        parts += [
            "## Where they work",
            "Kinds of weight that each adapter can be attached to; its page has the reason of a refusal.",
            _kinds_matrix(adapters),
        ]
    return "\n\n".join(parts) + "\n"


# --- results ----------------------------------------------------------------------------------------------------------


def benchmarks() -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Every file of benchmarks/results: its name, what it says of how it was made, and its rows.

    A row's case begins with the method's name. Only ratios to the opponent are shown: seconds are the machine's.
    """
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = []
        for case, measured in content["rows"].items():
            row = {"case": case, "beside": measured["opponent"]}
            for kind, figures in measured.items():
                if isinstance(figures, dict):
                    row |= {f"{kind}: {_words(key)}": v for key, v in figures.items() if key.endswith("_ratio")}
            rows.append({**row, "wanted": measured.get("wanted_ratio")})
        yield path.stem, content, rows


def _words(key: str) -> str:
    return key.removesuffix("_ratio").replace("_", " ")


def _rows_table(rows: list[dict[str, Any]]) -> str:
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "wanted"] + ["wanted"]
    return table(keys, [[_figure(row.get(key)) for key in keys] for row in rows])


def _figure(value: Any) -> str:
    if value is None or value == float("inf"):
        return "–"
    return f"{value:.2f}×" if isinstance(value, float) else prose(str(value))


def _made_by(facts: dict[str, Any]) -> str:
    shown = []
    for key in ("command", "device", "hardware", "threads", "versions", "commit"):
        value = facts.get(key)
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if not isinstance(v, (dict, list)))
        if value:
            shown.append(f"{key} `{value}`")
    return "Made by: " + "; ".join(shown) + "." if shown else ""


def _measured(slug: str) -> list[str]:
    parts = []
    for stem, _, rows in benchmarks():
        own = [row for row in rows if row["case"].split()[0] == slug]
        if own:
            lead = f"From `benchmarks/results/{stem}.json`, as ratios to the opponent in the same run:"
            parts += [lead, _rows_table(own)]
    for path in studies():
        headings, rows = _study_rows(path)
        own = [row for row in rows if f"`{slug}`" in row]
        if own:
            parts += [f"In the comparison {study_name(path)}:", table(headings, own)]
    where = "How these were made, and the other methods: [results](../results.md)."
    return ["## Measured", *parts, where] if parts else []


def studies() -> list[Path]:
    """Committed comparisons: docs/results/NAME/results.jsonl and benchmarks/results/NAME.jsonl."""
    benchmarked = (ROOT / "benchmarks" / "results").glob("*.jsonl")
    return sorted((DOCS / "results").glob("*/results.jsonl")) + sorted(benchmarked)


def study_name(path: Path) -> str:
    """A comparison's name, from its folder or its file."""
    stem = path.parent.name if path.name == "results.jsonl" else path.stem
    return stem.replace("_", " ")


def results_page() -> str:
    """Comparisons and benchmarks that are committed."""
    parts = [
        "# Results",
        "Figures on this page are read from result files that a committed command wrote; each comes with that command, "
        "the hardware, the versions and the commit.",
    ]
    for path in studies():
        parts += _study(path)
    for stem, facts, rows in benchmarks():
        parts += [f"## Speed: {stem.replace('_', ' ')}", _made_by(facts), _rows_table(rows)]
    if len(parts) == 2:
        parts.append("No result is committed yet.")
    return "\n\n".join(part for part in parts if part) + "\n"


@functools.cache
def _digested(path: Path) -> tuple[dict[str, Any], Any]:
    """A comparison's first row and what its report makes of it: read once, though every method's page asks for it."""
    from weft.report.study import parse, read
    from weft.report.tradeoffs import digest

    head, rows, notes = parse(path)
    return head, digest(head, rows, notes) if head.get("pillar") == "compress" else read(path)


def _study(path: Path) -> Iterator[str]:
    head, found = _digested(path)
    yield f"## Comparison: {study_name(path)}"
    if head.get("pillar") == "compress":
        yield prose(". ".join(f"Keeping {keep:g} of the bits, {found.verdict(keep)}" for keep in found.tables) + ".")
    else:
        yield prose(found.verdict)
    yield table(*_study_rows(path))
    yield _made_by(head)
    if (path.parent / "report.html").exists():
        yield f"[The whole report](results/{path.parent.name}/report.html)"


def _study_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Headings and one row a method of a comparison, as its report has them; a row a share, of compression."""
    from weft.report import quantities

    head, study = _digested(path)
    if head.get("pillar") == "compress":
        return _tradeoff_rows(study)
    rows = [
        [
            str(line.rank or ""),
            f"`{line.name}`",
            study.metric.show(line.mean, line.spread),
            quantities.count(line.trainable),
            quantities.size(line.peak_bytes),
            quantities.duration(line.step_seconds),
        ]
        for line in [*study.lines, *study.references]
    ]
    score = f"{study.metric.name.lower()}, {study.metric.unit}"
    return ["rank", "method", score, "trainable", "memory", "a step"], rows


def _tradeoff_rows(study: Any) -> tuple[list[str], list[list[str]]]:
    from weft.report.template import short

    headings = [f"perplexity, {short(name)}" for name in study.corpora]
    rows = []
    for keep, entries in study.tables.items():
        for entry in (entry for entry in entries if entry.row["status"] == "ok"):
            standing = entry.standings[0]
            place = "collapsed" if entry.collapsed else "–" if standing is None else str(standing.rank)
            losses = [entry.perplexity(corpus) for corpus in range(len(study.corpora))]
            shown = ["–" if loss is None else f"{loss:.4g}" for loss in losses]
            share = f"{entry.row['kept']:.3f}"
            rows.append([f"{keep:g}", place, f"`{entry.name}`", *shown, share])
    return ["keep", "rank", "method", *headings, "stored"], rows


# --- everything -------------------------------------------------------------------------------------------------------


def repository_page(name: str) -> str:
    """A Markdown file of the repository's root, its links into docs made the site's."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for there, here in (("docs/", ""), ("CONTRIBUTING.md", "contributing.md"), ("README.md", "index.md")):
        text = text.replace(f"]({there}", f"]({here}")
    return text


def pages() -> dict[str, str]:
    """Path below docs/generated → text."""
    made = {f"methods/{slug}.md": method_page(slug) for slug in weft.cards()}
    made["methods/index.md"] = index_page()
    made["reference/python.md"] = docstrings.python_page()
    made["reference/engine.md"] = docstrings.engine_page()
    made["reference/cli.md"] = docstrings.cli_page()
    made["results.md"] = results_page()
    made["guide.md"] = guide.page(table)
    made["contributing.md"] = repository_page("CONTRIBUTING.md")
    made["changelog.md"] = repository_page("CHANGELOG.md")
    return made


def undocumented() -> list[str]:
    """Public names, methods and options that nobody described."""
    missing = [f"weft.{name} has no docstring" for name, thing in docstrings.public().items() if not _described(thing)]
    for slug, card in weft.cards().items():
        where = f"src/weft/{card.pillar}/{slug}.py"
        if not (weft.registry.load(slug).__doc__ or "").strip():
            missing.append(f"{where} has no docstring: it is the method's page")
        missing += [f"{where}: CARD has no {name}" for name in ("title", "summary", "year") if not getattr(card, name)]
        if hasattr(weft.registry.load(slug), weft.registry.class_name(slug, "Config")):
            from weft.run.options import from_config

            missing += [
                f"{where}: option {option.name} has no help"
                for option in from_config(weft.config_class(slug))
                if not option.help
            ]
    for name in docstrings.verbs():
        missing += [
            f"weft {name}: option {flags} has no help"
            for _, flags, _, _, text in docstrings.options(docstrings.verb_function(name))
            if not text
        ]
    return missing


def _described(thing: Any) -> bool:
    return docstrings.has_docstring(thing) if callable(thing) else True


def write(made: dict[str, str]) -> None:
    """Write the pages, and remove those that are no longer made."""
    for old in GENERATED.rglob("*.md"):
        if old.relative_to(GENERATED).as_posix() not in made:
            old.unlink()
    for name, text in made.items():
        path = GENERATED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def main(argv: list[str]) -> int:
    """The command."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    known = evidence.written(guide.studies())
    if "--check" in argv:
        stale = {"README.md's table of methods": readme(text) != text}
        stale[f"{evidence.FILE.name}"] = known != evidence.FILE.read_text(encoding="utf-8")
        for what in (what for what, is_stale in stale.items() if is_stale):
            print(f"{what} is out of date; run python docs/generate.py --readme", file=sys.stderr)
        return int(any(stale.values()))
    missing = undocumented()
    for sentence in missing:
        print(sentence, file=sys.stderr)
    if "--readme" in argv:
        path.write_text(readme(text), encoding="utf-8")
        evidence.FILE.write_text(known, encoding="utf-8")
    write(pages())
    return 1 if missing else 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # other libraries' notices say nothing about these pages
    sys.exit(main(sys.argv[1:]))
