"""The report of `weft compare --pillar compress`: a ranking at every share, what a share costs, and every layer.

`digest` turns the rows of `results.jsonl` into entries, one a method and share, best first; the page and the terminal's
table are written from these. The study need not be finished.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from weft.errors import WeftError
from weft.report import quantities
from weft.report.quantities import NOTHING, finite
from weft.report.template import page, plain, rank_strip, short
from weft.run.ranking import Pair, Ranking, Standing
from weft.run.tradeoffs import COLLAPSED, dense_loss, key_of, rank_points, saves_reading, within

Row = dict[str, Any]

STAGES = ("decode", "prefill")
BATCHES = ("1", "16")


@dataclass
class Entry:
    """A method at one share.

    Attributes:
        index: the method's place in the study, from which colour and marker follow.
        row, speed: what was measured; `speed` is empty without a speed row that came out.
        standings: of the rankings at this share, one a test corpus; None where it has no place in it.
        gaps: what separates it from the first of each ranking; None for the first.
        wrecks: for each corpus whether it collapsed there, whether it stands in the ranking or not.
    """

    index: int
    row: Row
    speed: Row = field(default_factory=dict)
    standings: list[Standing | None] = field(default_factory=list)
    gaps: list[Pair | None] = field(default_factory=list)
    wrecks: list[bool] = field(default_factory=list)

    @property
    def collapsed(self) -> bool:
        """Whether it collapsed on the first corpus, by which methods are ranked."""
        return bool(self.wrecks and self.wrecks[0])

    @property
    def name(self) -> str:
        """The method."""
        return str(self.row["method"])

    def perplexity(self, corpus: int) -> float | None:
        """On a test corpus; None where it is not finite or was not measured."""
        return finite(self.row["corpora"][corpus].get("perplexity")) if self.row["corpora"] else None

    def tokens(self, stage: str, batch: str, whose: str = "speed") -> float | None:
        """Tokens a second; with `whose="dense_speed"` those of the dense model, which took turns with this one."""
        return finite(((self.speed.get(whose) or {}).get(stage) or {}).get(batch))

    def faster(self, stage: str, batch: str) -> float | None:
        """How many times the dense model's speed."""
        mine, other = self.tokens(stage, batch), self.tokens(stage, batch, "dense_speed")
        return mine / other if mine and other else None


@dataclass
class Tradeoffs:
    """A study as far as it got.

    Attributes:
        head: the study row.
        corpora: the names of the test corpora.
        dense: the original model's row; None before it was measured.
        tables: share → its entries, best first; shares descending.
        rankings: share → one ranking a corpus.
        rows: every row, the later one where a point was measured twice.
        notes: sentences for the reader.
    """

    head: Row
    corpora: list[str]
    dense: Row | None
    tables: dict[float, list[Entry]]
    rankings: dict[float, list[Ranking]]
    rows: list[Row]
    notes: list[str]

    @property
    def failures(self) -> list[Row]:
        """Rows of what failed."""
        return [row for row in self.rows if row["status"] == "failed"]

    @property
    def timed(self) -> bool:
        """Whether any speed was measured."""
        return any(entry.speed for entries in self.tables.values() for entry in entries)

    @property
    def trained(self) -> bool:
        """Whether anything was trained after it was made."""
        return any(row.get("train_seconds") is not None for row in self.rows)

    def verdict(self, keep: float) -> str:
        """Who won at a share, in one sentence."""
        first = self._leaders(keep, 0)
        entries = {entry.name: entry for entry in self.tables[keep]}
        if first is None:
            return "nothing to rank yet"
        if not first:
            return "no method can be recommended: each at least doubles the dense model's perplexity"
        best = entries[first[0]].perplexity(0) or math.inf
        ratio = best / math.exp(loss) if (loss := dense_loss(self.rows, 0)) is not None else None
        said = f"{_who(first)}, with a perplexity of {best:.4g}"
        said += f", {ratio:.3g} times the dense model's" if ratio is not None else ""
        other = self._leaders(keep, 1) if len(self.corpora) > 1 else None
        if other is not None and other != first:
            there = _who(other) if other else "every method collapses"
            said += f"; on {short(self.corpora[1])} {there}"
        return said

    def _leaders(self, keep: float, corpus: int) -> list[str] | None:
        """The methods of rank 1 that have not collapsed; None without a ranking."""
        rankings = self.rankings[keep]
        if corpus >= len(rankings) or not rankings[corpus].standings:
            return None
        return [each.method for each in rankings[corpus].standings if each.rank == 1 and not each.collapsed]


def _who(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} ranks first"
    return f"{quantities.listing(names)} tie for first"


def digest(head: Row, rows: list[Row], notes: list[str]) -> Tradeoffs:
    """The rows of a study in order: rankings, and where each point stands in them."""
    rows = list({key_of(row): row for row in rows}.values())
    methods, keeps = list(head["methods"]), sorted(head["keeps"], reverse=True)
    corpora = [str(each["data"]) for each in (head.get("plan") or {}).get("corpora") or []]
    notes = [*map(str, (head.get("plan") or {}).get("notes") or []), *notes]
    dense = next((row for row in rows if row["phase"] == "dense" and row["status"] == "ok"), None)
    speeds = {key_of(row)[1:]: row for row in rows if row["phase"] == "speed" and row["status"] == "ok"}
    losses = [dense_loss(rows, corpus) for corpus in range(len(corpora))]
    tables, rankings = {}, {}
    for keep in keeps:
        rankings[keep] = [_ranking(rows, keep, corpus, notes) for corpus in range(len(corpora))]
        entries = [
            Entry(methods.index(row["method"]), row, speeds.get(key_of(row)[1:], {}))
            for row in rows
            if row["phase"] == "quality" and row["keep"] == keep
        ]
        for entry in entries:
            _stand(entry, rankings[keep], losses)
        tables[keep] = sorted(entries, key=_order)
    if len(corpora) == 1:
        notes.append("One test corpus: a model looks best on text such as it was compressed with (--data2).")
    return Tradeoffs(head, corpora, dense, tables, rankings, rows, notes)


def _ranking(rows: Sequence[Row], keep: float, corpus: int, notes: list[str]) -> Ranking:
    try:
        return rank_points(rows, keep, corpus)
    except WeftError as error:
        notes.append(f"The methods could not be ranked at {keep:g}: {error}.")
        return Ranking((), ())


def _stand(entry: Entry, rankings: Sequence[Ranking], dense: Sequence[float | None]) -> None:
    for corpus, ranking in enumerate(rankings):
        standing = next((each for each in ranking.standings if each.method == entry.name), None)
        first = ranking.standings[0].method if ranking.standings else entry.name
        entry.standings.append(standing)
        entry.gaps.append(None if standing is None or first == entry.name else ranking.pair(entry.name, first))
        loss = finite(entry.row["corpora"][corpus].get("loss")) if entry.row["status"] == "ok" else None
        limit = dense[corpus]
        entry.wrecks.append(
            entry.row["status"] == "ok" and (loss is None or (limit is not None and not loss < limit + COLLAPSED))
        )


def _order(entry: Entry) -> tuple[Any, ...]:
    standing = entry.standings[0] if entry.standings else None
    place = (0, standing.rank, standing.mean) if standing is not None else (1, 0, entry.perplexity(0) or math.inf)
    return (entry.row["status"] == "failed", *place)


# --- cells as text ----------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    """A perplexity: two decimals while it is small."""
    if value is None:
        return "not finite"
    if value >= 1000:
        return f"{value:,.0f}" if value < 1e6 else f"{value:.2g}"
    return f"{value:.{2 if value < 100 else 1}f}"


def _interval(standing: Standing | None) -> str:
    if standing is None:
        return ""
    low, high = (_number(math.exp(min(value, 700.0))) for value in (standing.low, standing.high))
    return f"{low} to {high}"


def _gap(pair: Pair | None) -> tuple[str, str]:
    """The difference in nats a token, and its interval."""
    if pair is None:
        return "", ""
    low, high = (quantities.change(value, 3) for value in (pair.low, pair.high))
    return quantities.change(pair.difference, 3), f"{low} to {high}" + (", tie" if pair.better is None else "")


def _cells(entry: Entry, study: Tradeoffs) -> dict[str, Any]:
    """One line of a share's table, every cell as text."""
    row = entry.row
    standing = entry.standings[0] if entry.standings else None
    ranked = standing is not None and not entry.collapsed
    failed = row["status"] == "failed"
    corpora = []
    for corpus in range(len(study.corpora)):
        each = entry.standings[corpus]
        known = {} if failed else row["corpora"][corpus]
        gap, interval = _gap(entry.gaps[corpus])
        corpora.append(
            {
                "perplexity": NOTHING if failed else _number(entry.perplexity(corpus)),
                "interval": _interval(each),
                "gap": gap,
                "gap_interval": interval,
                "kl": quantities.number(finite(known.get("kl")), 3),
                "agreement": f"{known['agreement']:.1%}".replace("%", " %") if "agreement" in known else NOTHING,
            }
        )
    outside = not failed and not within(row)
    share = None if failed else row["reads"] / row["dense_bits"]
    return {
        "entry": entry,
        "name": entry.name,
        "rank": str(standing.rank) if standing is not None and ranked else "",
        "collapsed": entry.collapsed,
        "failed": row["error"] if failed else None,
        "outside": outside and ("reads more" if saves_reading(entry.name) else "stores more"),
        "corpora": corpora,
        "kept": NOTHING if failed else f"{row['kept']:.3f}",
        "bytes": NOTHING if failed else quantities.size(row["bits"] / 8),
        "file": NOTHING if failed else quantities.size(row["file_bytes"]),
        "made": quantities.duration(row["seconds"]),
        "trained": quantities.duration(row.get("train_seconds")),
        "read": NOTHING if share is None else f"{share:.3f}",
        "speeds": [[quantities.short_count(entry.tokens(stage, batch)) for batch in BATCHES] for stage in STAGES],
    }


def terminal_table(study: Tradeoffs) -> Table:
    """The ranking at every share, with who won beneath; 80 columns are enough for two corpora."""
    said = [f"{keep:g}: {study.verdict(keep)}." for keep in study.tables]
    said += study.notes
    if study.failures:
        said.append(f"{quantities.plural(len(study.failures), 'point')} failed; the report says why.")
    table = Table(
        caption=escape("\n".join(said)), caption_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("keep", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    columns = ["perplexity", "95 %", *(["second"] if len(study.corpora) > 1 else []), "stored", "read"]
    for name in [*columns, *(["tokens/s"] if study.timed else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    if study.dense is not None:
        second = [_number(study.dense["corpora"][1]["perplexity"])] if len(study.corpora) > 1 else []
        table.add_row("", "", "dense", _number(study.dense["corpora"][0]["perplexity"]), "", *second, "1", "1")
        table.add_section()
    for keep, entries in study.tables.items():
        for place, entry in enumerate(entries):
            cells = _cells(entry, study)
            shown = [f"{keep:g}" if place == 0 else "", cells["rank"], entry.name]
            if cells["failed"]:
                table.add_row(*shown, "failed")
                continue
            first, *second = cells["corpora"]
            state = "collapsed" if entry.collapsed else cells["outside"] or first["interval"]
            shown += [first["perplexity"], state, *(each["perplexity"] for each in second)]
            shown += [cells["kept"], cells["read"]]
            shown += [cells["speeds"][0][0]] if study.timed else []
            table.add_row(*map(escape, shown), style="dim" if entry.collapsed else None)
        table.add_section()
    return table


# --- the page ---------------------------------------------------------------------------------------------------------


def render(study: Tradeoffs) -> str:
    """The page's text."""
    head = study.head
    return page(
        "tradeoffs.html.j2",
        "tradeoffs.js",
        _figures(study),
        study=study,
        head=head,
        title=f"Compressing {short(head.get('model'))}",
        verdicts=[(f"{keep:g}", study.verdict(keep)) for keep in study.tables],
        facts=_facts(study),
        corpora=[short(name) for name in study.corpora],
        tables=[(f"{keep:g}", [_cells(entry, study) for entry in entries]) for keep, entries in study.tables.items()],
        dense=_dense(study),
        settings={k: v for k, v in (head.get("request") or {}).items() if k not in ("versions", "pillar")},
        points=[row for row in study.rows if row["phase"] == "quality" and row.get("command")],
    )


def _facts(study: Tradeoffs) -> list[tuple[str, str]]:
    found = study.head.get("plan") or {}
    done = sum(row["status"] == "ok" for row in study.rows)
    request = study.head.get("request") or {}
    wanted = 1 + len(study.head["methods"]) * len(study.head["keeps"]) * (2 if request.get("speed") else 1)
    points = f"{done} of {wanted} rows" + (f", {len(study.failures)} failed" if study.failures else "")
    facts = {"Model": plain(study.head.get("model"))}
    if found.get("dense_bits"):
        facts["Compressed"] = f"{found['matrices']:,} matrices, {quantities.size(found['dense_bits'] / 8)}"
    for name, each in (found.get("calibration") or {}).items():
        facts["Calibration"] = f"{short(name)}: {each['sequences']} sequences, {each['tokens']:,} tokens"
    for number, corpus in enumerate(found.get("corpora") or []):
        counts = f"{quantities.plural(corpus['rows'], 'row')} of {quantities.plural(corpus['documents'], 'text')}"
        notes = "".join(f"; {note}" for note in corpus["notes"])
        name = short(corpus["data"]) + (", test split" if corpus["split"] == "test" else "")
        facts["Second test" if number else "Test"] = f"{name}: {counts}{notes}"
    return list({**facts, "Measured": points, "Started": quantities.minute(study.head.get("started"))}.items())


def _dense(study: Tradeoffs) -> dict[str, Any] | None:
    """The original model's line in the tables."""
    row = study.dense
    if row is None:
        return None
    return {
        "corpora": [_number(finite(each["perplexity"])) for each in row["corpora"]],
        "bytes": quantities.size(row["bits"] / 8),
        "file": quantities.size(row["file_bytes"]),
        "speeds": [[quantities.short_count(_middle(study, stage, batch)) for batch in BATCHES] for stage in STAGES],
    }


def _middle(study: Tradeoffs, stage: str, batch: str) -> float | None:
    """Tokens a second of the dense model, which took turns with every point: the median."""
    found = [entry.tokens(stage, batch, "dense_speed") for entries in study.tables.values() for entry in entries]
    known = sorted(value for value in found if value is not None)
    return known[len(known) // 2] if known else None


def _figures(study: Tradeoffs) -> dict[str, Any]:
    """The numbers behind the figures; null is what was not measured."""
    by_method: dict[str, list[Entry]] = {name: [] for name in study.head["methods"]}
    for entries in study.tables.values():
        for entry in entries:
            if entry.row["status"] == "ok":
                by_method[entry.name].append(entry)
    dense: Row | None = None
    if study.dense is not None:
        dense = {**_costs(study.dense), "y": [finite(each["perplexity"]) for each in study.dense["corpora"]]}
        dense |= {f"{stage}{batch}": 1.0 if study.timed else None for stage in STAGES for batch in BATCHES}
    return {
        "keeps": list(study.tables),
        "corpora": [short(name) for name in study.corpora],
        "dense": dense,
        "methods": [
            {
                "name": name,
                "index": index,
                "reference": False,
                "points": [_drawn(entry, study) for entry in by_method[name]],
            }
            for index, name in enumerate(study.head["methods"])
        ],
    }


def _costs(row: Row) -> dict[str, float]:
    return {"bytes": row["bits"] / 8, "read_bytes": row["reads"] / 8}


def _drawn(entry: Entry, study: Tradeoffs) -> dict[str, Any]:
    """One point of the figures, and its layers as a grid of [size, share of the bits, error]."""
    cells = _cells(entry, study)
    layers = {
        name: [layer["size"], round(layer["bits"] / layer["dense"], 4), _short_float(layer["error"])]
        for layer in entry.row["layers"]
        for name in layer.get("parts") or [layer["name"]]
    }
    return {
        "keep": entry.row["keep"],
        **_costs(entry.row),
        **{f"{stage}{batch}": entry.faster(stage, batch) for stage in STAGES for batch in BATCHES},
        "y": [entry.perplexity(corpus) for corpus in range(len(study.corpora))],
        "collapsed": entry.wrecks,
        "text": {
            "y": [each["perplexity"] for each in cells["corpora"]],
            "state": "collapsed" if entry.collapsed else f"rank {cells['rank']}" if cells["rank"] else "",
            "speeds": {
                f"{stage}{batch}": quantities.short_count(entry.tokens(stage, batch))
                for stage in STAGES
                for batch in BATCHES
            },
            "costs": f"stored {cells['kept']}, {cells['bytes']}; read {cells['read']}",
        },
        "layers": rank_strip(layers),
    }


def _short_float(value: float | None) -> float | None:
    value = finite(value)
    return None if value is None else float(f"{value:.4g}")
