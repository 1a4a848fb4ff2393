"""Which adapter, when: the page, and the evidence of `weft adapt --method auto`, both of committed results."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import numpy as np

import weft
from weft.report import quantities
from weft.report import study as _study
from weft.run.evidence import OPPONENT, STREAM, Found, Study, candidates
from weft.run.ranking import REFERENCES, Standing, rank

DOCS = Path(__file__).resolve().parent
STREAMS = DOCS.parent / "benchmarks" / "results" / "streams" / "sentences.json"

# Comparisons of all adapters, in docs/results: what was adapted to what
ABOUT = {
    "shakespeare": "a Llama of 260 thousand parameters that knows children's stories, to Shakespeare",
    "e2e": "the same Llama, to descriptions of restaurants",
    "sst2": "all-MiniLM, an encoder of 23 million parameters, to the sentiment of 2,000 sentences",
    "mrpc": "all-MiniLM without dropout, to pairs of sentences that say the same or do not",
    "cola": "all-MiniLM without dropout, to sentences that are grammatical or not",
    "digits": "a vision transformer of 35 thousand parameters, to digits turned and inverted",
}
STREAMED = (
    "all-MiniLM, through five tasks of classification, one after another; about 680,000 trainable parameters where a "
    "method can have as many, 125 steps a task"
)
ELSEWHERE = {
    "petalface": "weighs images by their quality, which is why it is in none of these but was measured on "
    "[photographs of faces](howto/verification.md#on-faces)",
}
KINDS = {  # as a reader calls them
    "causal-lm": "language modelling",
    "classification": "classification of text",
    "image-classification": "classification of images",
    STREAM: "tasks one after another",
}


@functools.cache
def studies() -> tuple[Study, ...]:
    """The committed comparisons of all adapters."""
    found = [_compared(name) for name in ABOUT if (DOCS / "results" / name / "results.jsonl").exists()]
    return (*found, *([_streamed(json.loads(STREAMS.read_text(encoding="utf-8")))] if STREAMS.exists() else []))


def _compared(name: str) -> Study:
    study = _study.read(DOCS / "results" / name)
    lines = {line.name: line for line in study.lines if line.rank is not None}
    beside = lines[OPPONENT]
    methods = {
        line.name: Found(
            score=_round(line.mean),
            spread=_round(line.spread),
            beaten=_beaten(line.rank, len(lines)),
            trainable=int(line.trainable or 0),
            time=_ratio(line.step_seconds, beside.step_seconds),
            memory=_ratio(line.peak_bytes, beside.peak_bytes),
            file_bytes=round(line.file_bytes) if line.file_bytes else None,
            forgotten=_round(line.forgotten),
        )
        for line in lines.values()
    }
    budget = study.head["budget"]
    return Study(
        name, study.head["task"], study.metric.key, ABOUT[name], str(study.head["command"]), len(study.head["seeds"]),
        budget.get("steps"), budget.get("params"), methods,
        {line.name: _round(line.mean) for line in study.references},
    )  # fmt: skip


def _streamed(content: dict[str, Any]) -> Study:
    """The stream: what is right on all tasks after the last one, ranked over test rows and seeds.

    Which rows are right is not kept, so those of two methods are paired by chance: intervals are too wide, if anything.
    """
    chance = np.random.default_rng(0)

    def rows(rates: list[float]) -> list[list[int]]:
        each = (np.arange(content["tested"]) < round(rate * content["tested"]) for rate in rates)
        return [[int(right), 1] for task in each for right in chance.permutation(task)]

    found = {name: each for name, each in content["methods"].items() if name not in REFERENCES}
    scores = {
        name: {seed: rows(matrix[-1]) for seed, matrix in enumerate(each["matrices"])} for name, each in found.items()
    }
    standings: Sequence[Standing] = rank(scores, higher_is_better=True).standings
    methods = {
        each.method: Found(
            score=_round(each.mean),
            spread=_round(each.spread),
            beaten=_beaten(each.rank, len(standings)),
            trainable=found[each.method]["trainable"],
            forgotten=_round(fmean(found[each.method]["forgetting"])),
        )
        for each in standings
    }
    references = {name: _round(fmean(each["last"])) for name, each in content["methods"].items() if name in REFERENCES}
    seeds = len(next(iter(found.values()))["matrices"])
    command = "python benchmarks/streams.py --data-dir DIR"
    return Study("streams", STREAM, "accuracy", STREAMED, command, seeds, None, None, methods, references)


def _beaten(place: int | None, count: int) -> float:
    return _round(((place or 1) - 1) / max(count - 1, 1))


def _ratio(value: float | None, other: float | None) -> float | None:
    return _round(value / other) if value and other else None


def _round(value: Any) -> Any:
    return None if value is None else float(f"{value:.4g}")


# --- the page ---------------------------------------------------------------------------------------------------------


def page(table: Callable[[list[str], list[list[str]]], str]) -> str:
    """Which adapter, when; `table` writes one in Markdown."""
    found = studies()
    ours = {name for study in found for name in study.methods if not name.startswith("peft:")}
    peers = {name for study in found for name in study.methods} - ours
    parts = [
        "# Which adapter, when",
        f"{len(ours)} adapters of weft and {len(peers)} of PEFT, measured on {len(found)} problems: equal counts of "
        "trainable parameters, a learning rate chosen for each on a grid, test rows that nothing was chosen on, three "
        "seeds. The models are small and the runs short: what is surely better here is a reason to try it first, and "
        "[`weft compare`](howto/choose.md) says what holds on your own model and data.\n{ .lead }",
        "## In short",
        table(["you train", "take", "because"], list(_short(found))),
        "`weft adapt --method auto` takes the same, for the task that your data are for and among the methods that fit "
        "your model, and prints the reason:",
        "```sh\nweft adapt --model builtin:pycode --data builtin:pydocs --method auto --output runs/auto\n```",
        "A method is surely better than another where the 95 % interval of their paired difference says so. First "
        "comes the method that the fewest others surely beat; among equals the one whose step is the fastest.",
        "## On each problem",
        table(*_scores(found)),
        "**Bold**: no other method is surely better. Losses are nats a token, lower is better; the rest is accuracy, "
        "of streams that on all tasks after the last one. The share is of other methods that are surely better, the "
        "mean over all problems.",
        _problems(found),
        *_elsewhere(found),
        "## What it costs",
        table(*_costs(found)),
        f"Time and memory of a training step are ratios to `{OPPONENT}`'s in the same comparison, geometric means; on "
        "two cores, where a step of a small model is mostly overhead: [the growth with width](results.md) tells more "
        "of large ones. The file is what is passed on, of the comparison where it is largest. "
        "[What each can be attached to](methods/index.md#where-they-work).",
        *_forgetting(found, table),
        "## What the papers claim, and what held",
        table(*_claims(found)),
        "The verdicts are those of [the ledger](ledger.md), on problems built for each claim; first places are of the "
        "problems above.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _short(found: Sequence[Study]) -> Iterator[list[str]]:
    for kind, called in KINDS.items():
        of_kind = candidates(kind, found)
        if not of_kind:
            continue
        best = of_kind[0]
        level = [each.name for each in of_kind if each.beaten == best.beaten]
        if best.beaten:
            reason = f"the fewest others are surely better, {best.beaten:.0%} of {len(of_kind) - 1}"
        else:
            reason = "no other is surely better"
        if len(level) > 1:
            reason += f"; the fastest of {len(level)} of which that is so, beside {_listed(level[1:])}"
        else:
            reason += f"; next {_listed([each.name for each in of_kind[1:4]])}"
        yield [called, f"`{best.name}`", reason]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _names(found: Sequence[Study]) -> list[str]:
    """Every method, the one that is beaten least first."""
    names = dict.fromkeys(name for study in found for name in study.methods)
    return sorted(names, key=lambda name: (_mean_beaten(name, found), name))


def _mean_beaten(name: str, found: Sequence[Study]) -> float:
    return fmean(study.methods[name].beaten for study in found if name in study.methods)


def _scores(found: Sequence[Study]) -> tuple[list[str], list[list[str]]]:
    def cell(study: Study, name: str) -> str:
        if name not in study.methods:
            return _score(study, study.references[name]) if name in study.references else "–"
        shown = _score(study, study.methods[name].score)
        return f"**{shown}**" if study.methods[name].beaten == 0 else shown

    def share(name: str) -> str:
        return _together(f"{100 * _mean_beaten(name, found):.0f} %")

    rows = [[_linked(name), *(cell(study, name) for study in found), share(name)] for name in _names(found)]
    rows += [[f"*{name}*", *(cell(study, name) for study in found), ""] for name in ("full", "head", "base")]
    return ["method", *(study.name for study in found), "surely better"], rows


def _score(study: Study, value: float) -> str:
    return f"{value:.3f}" if study.metric == "loss" else _together(f"{100 * value:.1f} %")


def _linked(name: str) -> str:
    return f"`{name}`" if name.startswith("peft:") else f"[`{name}`](methods/{name}.md)"


def _problems(found: Sequence[Study]) -> str:
    lines = []
    for study in found:
        link = f"results.md#comparison-{study.name}" if study.kind != STREAM else "howto/streams.md"
        count = quantities.count(study.params)
        asked = f"; about {count} trainable parameters, {study.steps} steps" if study.steps else ""
        lines.append(f"- [{study.name}]({link}): {study.about}{asked}.")
    return "\n".join(lines)


def _elsewhere(found: Sequence[Study]) -> Iterator[str]:
    """Adapters that none of the comparisons can have, and where they were measured."""
    for slug in sorted(set(weft.cards("adapters")) - set(_names(found))):
        yield f"{_linked(slug)} {ELSEWHERE.get(slug, 'is in none of these yet')}."


def _costs(found: Sequence[Study]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name in _names(found):
        each = [study.methods[name] for study in found if name in study.methods]
        sizes = [one.file_bytes for one in each if one.file_bytes]
        exports = "–" if name.startswith("peft:") else weft.card(name).exports
        rows.append([_linked(name), _times([one.time for one in each]), _times([one.memory for one in each]),
                     _together(quantities.size(max(sizes))) if sizes else "–", exports])  # fmt: skip
    return ["method", "time of a step", "memory of a step", "file", "as LoRA"], rows


def _together(words: str) -> str:
    """On one line, however narrow the column."""
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def _times(ratios: Sequence[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio]
    return f"{geometric_mean(known):.2f}×" if known else "–"


def _forgetting(found: Sequence[Study], table: Callable[[list[str], list[list[str]]], str]) -> Iterator[str]:
    for study in found:
        lost = {name: each.forgotten for name, each in study.methods.items() if each.forgotten is not None}
        if study.kind != STREAM or not lost:
            continue
        yield "## What is forgotten"
        rows = [
            [_linked(name), _score(study, study.methods[name].score), _together(f"{100 * lost[name]:.1f} points")]
            for name in sorted(lost, key=lambda name: lost[name])
        ]
        yield table(["method", "all tasks after the last", "forgotten"], rows)
        yield f"{study.about[0].upper()}{study.about[1:]}, {study.seeds} seeds: `{study.command}`. "


def _claims(found: Sequence[Study]) -> tuple[list[str], list[list[str]]]:
    ledger = (DOCS / "ledger.md").read_text(encoding="utf-8")
    rows = []
    for slug, claim, verdicts in re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| (.*?) \| (.*?) \|$", ledger, re.MULTILINE):
        first = [study.name for study in found if slug in study.methods and study.methods[slug].beaten == 0]
        rows.append([_linked(slug), claim, f"[{verdicts}](ledger.md#{slug})", ", ".join(first) or "–"])
    return ["method", "claim", "what was tried of it", "first on"], rows
