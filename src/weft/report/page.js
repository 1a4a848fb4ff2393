// Draws the figures of a comparison of adapters from the JSON beside it, behind figures.js.
(() => {
  const { metric, methods } = JSON.parse(document.getElementById("study-data").textContent);
  const ranked = methods.filter((m) => !m.reference);
  const references = methods.filter((m) => m.reference);
  const worse = metric.higher ? -1 : 1; // worse · value grows as quality falls

  // the extent, widened to those references that do not squeeze the methods together
  function widened([low, high], extra, part) {
    const span = high - low || Math.abs(high) * 0.02;
    for (const value of extra) {
      const [a, b] = [Math.min(low, value), Math.max(high, value)];
      if (b - a <= 1.4 * span) [low, high] = [a, b];
    }
    return padded([low, high], part);
  }
  function scoreDomain(points, part) {
    const extent = d3.extent(points.flatMap((m) => [m.mean - (m.spread ?? 0), m.mean + (m.spread ?? 0)]));
    return widened(extent, references.filter((m) => m.mean !== null).map((m) => m.mean), part);
  }

  // ---- figure: what separates each method from the first, one row a method
  function gaps(box, width) {
    const shown = ranked.filter((m) => m.gap);
    if (shown.length < 2) return null;
    const all = shown.flatMap((m) => [m.gap.mean, m.gap.low ?? 0, m.gap.high ?? 0, ...m.gap.seeds.map((s) => s[1])]);
    const domain = widened(d3.extent(all), references.filter((m) => m.gap).map((m) => m.gap.mean), 0.05);
    const rows = [...shown, ...references.filter((m) => m.gap && inside(m.gap.mean, domain))];
    const outside = references.filter((m) => m.gap && !rows.includes(m));
    const data = rows.map((m) => ({ m }));
    const lines = data.filter((d) => d.m.gap.low !== null);
    const seeds = rows.flatMap((m) => (m.gap.seeds.length > 1 ? m.gap.seeds.map(([seed, value]) => ({ m, seed, value })) : [])).filter((d) => inside(d.value, domain));
    const left = nameMargin(rows.map((m) => m.name), width);
    const svg = plot({
      width, height: rows.length * 26 + 58, marginLeft: left, marginRight: 14, marginBottom: 44, marginTop: 6,
      x: { domain, label: metric.unit === "%" ? "Percentage points" : metric.unit, labelAnchor: "center", labelArrow: "none", grid: true, ticks: Math.max(3, width / 110), tickFormat: "+" },
      y: { domain: rows.map((m) => m.name), label: null, tickSize: 0, padding: 0.2, insetBottom: 8 },
      marks: [
        Plot.ruleX([0], { stroke: "var(--soft)" }),
        named(Plot.ruleY(lines, { y: (d) => d.m.name, x1: (d) => d.m.gap.low, x2: (d) => d.m.gap.high, stroke: (d) => colour(d.m), strokeWidth: 2, className: "intervals" }), lines),
        named(Plot.dot(seeds, { y: (d) => d.m.name, x: "value", r: 2.3, dy: 7, fill: (d) => colour(d.m), fillOpacity: 0.55 }), seeds),
        named(Plot.dot(data, { y: (d) => d.m.name, x: (d) => d.m.gap.mean, r: 5, symbol: (d) => symbol(d.m), fill: (d) => (d.m.reference ? "var(--paper)" : colour(d.m)), stroke: (d) => (d.m.reference ? colour(d.m) : "var(--paper)"), strokeWidth: (d) => (d.m.reference ? 1.5 : 0.8), className: "means" }), data),
        tip(data, { y: (d) => d.m.name, x: (d) => d.m.gap.mean, title: (d) => `${summary(d.m)}\n${gapWords(d.m)}` }),
      ],
    });
    if (!outside.length) return svg;
    const words = outside.map((m) => `${m.name} at ${m.gap.text}`).join(", ");
    return [svg, d3.create("p").attr("class", "caption").text(`Beyond the axis: ${words}.`).node()];
  }
  function gapWords(m) {
    if (m.gap.low === null) return m.gap.mean === 0 ? "best mean" : `difference ${m.gap.text}`;
    const sign = d3.format(`+.${metric.digits}f`);
    return `difference ${m.gap.text}, interval ${sign(m.gap.low)} to ${sign(m.gap.high)}${m.gap.apart ? "" : "\na tie with the first"}`;
  }
  const summary = (m) => `${m.name}${m.rank ? ` · rank ${m.rank}` : ""}\n${metric.name} ${m.text.score}`;

  // ---- figure: quality against one cost
  const COSTS = {
    trainable: { label: "Trainable parameters", text: "trainable", units: [[1e9, "billions"], [1e6, "millions"], [1e3, "thousands"], [1, ""]] },
    peak_bytes: { label: "Peak memory", text: "peak", units: [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]] },
    step_seconds: { label: "Time per step", text: "step", units: [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]] },
    optimizer_bytes: { label: "Optimiser's state", text: "state_bytes", units: [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]] },
    file_bytes: { label: "File", text: "file", units: [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]] },
  };
  function front(points) {
    const sorted = d3.sort(points, (p) => p.x, (p) => worse * p.m.mean);
    let best = Infinity;
    return sorted.filter((p) => worse * p.m.mean < best && ((best = worse * p.m.mean), true));
  }
  function pareto(box, width) {
    const cost = COSTS[box.dataset.cost];
    const shown = ranked.filter((m) => m.mean !== null && m[box.dataset.cost] > 0);
    if (!shown.length) return null;
    const most = d3.max(shown, (m) => m[box.dataset.cost]);
    const [divisor, unit] = cost.units.find(([size]) => most >= size) ?? cost.units.at(-1);
    const points = shown.map((m) => ({ m, x: m[box.dataset.cost] / divisor, y: m.mean }));
    const [low, high] = d3.extent(points, (p) => p.x);
    if (low === high && points.length > 1) return null; // it costs the same with all of them
    const log = high / low > 6;
    const xDomain = log ? [low / 1.5, high * 1.6] : padded([low, high], 0.14);
    const yDomain = scoreDomain(shown, 0.12);
    const best = front(points);
    const edge = points.length < 2 ? [] : [...best.map((p) => ({ x: p.x, y: p.m.mean })), { x: xDomain[1], y: best.at(-1).m.mean }];
    const lines = references.filter((m) => inside(m.mean, yDomain));
    const format = log ? (t) => d3.format("~r")(+t.toPrecision(3)) : undefined;
    const base = {
      width, height: Math.round(Math.min(340, Math.max(270, width * 0.66))), marginLeft: 46, marginRight: 12, marginTop: 12, marginBottom: 42,
      x: { type: log ? "log" : "linear", domain: xDomain, ticks: ticks(xDomain, log) ?? Math.max(3, width / 95), tickFormat: format, label: unit ? `${cost.label} (${unit})` : cost.label, labelAnchor: "center", labelArrow: "none" },
      y: { domain: yDomain, grid: true, ticks: 6, label: null },
    };
    const marks = [
      Plot.ruleY(lines, { y: "mean", stroke: "var(--reference)", strokeDasharray: "2 3" }),
      Plot.text(lines, { y: "mean", text: "name", frameAnchor: "right", textAnchor: "end", dy: -7, fill: "var(--reference)" }),
      Plot.line(edge, { x: "x", y: "y", curve: "step-after", stroke: "var(--ink)", strokeOpacity: 0.55, strokeWidth: 1.3, className: "front" }),
      named(Plot.ruleX(points, { x: "x", y1: (p) => p.m.mean - (p.m.spread ?? 0), y2: (p) => p.m.mean + (p.m.spread ?? 0), stroke: (p) => colour(p.m), strokeWidth: 1.4, strokeOpacity: 0.6 }), points),
      named(Plot.dot(points, { x: "x", y: (p) => p.m.mean, r: 5.5, symbol: (p) => symbol(p.m), fill: (p) => colour(p.m), stroke: "var(--paper)", strokeWidth: 0.8, className: "points" }), points),
    ];
    const labels = place(points, plot({ ...base, marks }), width, base.height, best).map(({ p, dx, dy, anchor }) =>
      named(Plot.text([p], { x: "x", y: (d) => d.m.mean, text: (d) => d.m.name, dx, dy, textAnchor: anchor, fill: "var(--ink)", stroke: "var(--paper)", strokeWidth: 3 }), [p]));
    const reading = tip(points, { x: "x", y: (p) => p.m.mean, title: (p) => `${summary(p.m)}\n${cost.label.toLowerCase()} ${p.m.text[cost.text]}${best.includes(p) ? "\non the front" : ""}` });
    return plot({ ...base, marks: [...marks, ...labels, reading] });
  }
  // ---- figure: learning curves
  function curves(box, width) {
    const key = box.dataset.curve;
    const thin = ranked.flatMap((m) => m.curves.flatMap((c) => c[key].map(([x, y]) => ({ m, x, y, z: `${m.name}/${c.seed}` }))));
    if (!thin.length) return null;
    const strong = ranked.flatMap((m) => {
      const steps = d3.group(m.curves.flatMap((c) => c[key]), ([step]) => step);
      const all = m.curves.filter((c) => c[key].length).length;
      // a step that only some seeds reached would make the mean jump
      return d3.sort([...steps], ([step]) => step).filter(([, at]) => at.length === all).map(([x, at]) => ({ m, x, y: d3.mean(at, (d) => d[1]) }));
    });
    // the first steps and a diverging run would flatten everything else
    const values = d3.sort(thin.map((d) => d.y));
    const [low, high] = [values[0], Math.max(d3.quantileSorted(values, 0.97), d3.max(d3.rollups(thin, (v) => v.at(-1).y, (d) => d.z), ([, y]) => Math.min(y, values[0] * 2 || y)))];
    const ends = d3.rollups(thin, (v) => v.at(-1), (d) => d.z).map(([, d]) => d);
    const seeds = ranked.some((m) => m.curves.length > 1);
    const by = { x: "x", y: "y", stroke: (d) => colour(d.m), strokeDasharray: (d) => dash(d.m), clip: true };
    return plot({
      width, height: Math.round(Math.min(340, Math.max(270, width * 0.66))), marginLeft: 46, marginRight: 12, marginTop: 12, marginBottom: 42,
      x: { label: "Step", labelAnchor: "center", labelArrow: "none", ticks: Math.max(3, width / 95) },
      y: { domain: padded([low, high], 0.04), grid: true, ticks: 6, label: null },
      marks: [
        ...(seeds ? ranked.filter((m) => m.curves.length).map((m) => { const own = thin.filter((d) => d.m === m); return named(Plot.line(own, { ...by, z: "z", stroke: colour(m), strokeDasharray: dash(m), strokeWidth: 0.8, strokeOpacity: 0.38 }), own); }) : []),
        ...ranked.map((m) => { const own = strong.filter((d) => d.m === m); return named(Plot.line(own, { ...by, stroke: colour(m), strokeDasharray: dash(m), strokeWidth: 2, className: "curve" }), own); }),
        named(Plot.dot(ends.filter((d) => d.y <= high), { x: "x", y: "y", r: 3, symbol: (d) => symbol(d.m), fill: (d) => colour(d.m) }), ends.filter((d) => d.y <= high)),
        tip(strong, { x: "x", y: "y", title: (d) => `${d.m.name}\nstep ${d.x} · loss ${d.y.toFixed(3)}` }),
      ],
    });
  }

  // ---- figure: forgetting
  function forgetting(box, width) {
    const shown = d3.sort(methods.filter((m) => m.forgotten !== null && m.name !== "base"), (m) => m.forgotten);
    if (!shown.length) return null;
    const data = shown.map((m) => ({ m }));
    const seeds = shown.flatMap((m) => (m.forgetting.length > 1 ? m.forgetting.map(([seed, value]) => ({ m, seed, value })) : []));
    const left = nameMargin(shown.map((m) => m.name), width);
    return plot({
      width, height: shown.length * 25 + 58, marginLeft: left, marginRight: 56, marginBottom: 40, marginTop: 4,
      x: { label: "Change of loss", labelAnchor: "center", labelArrow: "none", grid: true, ticks: Math.max(3, width / 110), nice: true },
      y: { domain: shown.map((m) => m.name), label: null, tickSize: 0, padding: 0.32 },
      marks: [
        named(Plot.barX(data, { y: (d) => d.m.name, x: (d) => d.m.forgotten, fill: (d) => colour(d.m), fillOpacity: (d) => (d.m.reference ? 0.45 : 0.85), className: "bars" }), data),
        Plot.ruleX([0], { stroke: "var(--soft)" }),
        named(Plot.dot(seeds, { y: (d) => d.m.name, x: "value", r: 2.4, fill: "var(--paper)", stroke: "var(--ink)", strokeWidth: 1 }), seeds),
        named(Plot.text(data, { y: (d) => d.m.name, x: (d) => Math.max(0, d.m.forgotten, ...d.m.forgetting.map((f) => f[1])), text: (d) => d.m.text.forgotten, textAnchor: "start", dx: 8, fill: "var(--soft)" }), data),
      ],
    });
  }

  // ---- figure: learning rates, one small plot a method on shared axes
  function rates(box, room) {
    const shown = ranked.filter((m) => new Set(m.grid.map((g) => g[0])).size > 1);
    if (!shown.length) return null;
    const scores = d3.sort(shown.flatMap((m) => m.grid.map((g) => g[2]).filter((v) => v !== null)));
    if (!scores.length) return null;
    // good values decide the axis, every method's best among them; a run that nearly diverged is an arrow at its edge
    const bests = shown.map((m) => d3.min(m.grid, (g) => g[2] ?? Infinity)).filter(Number.isFinite);
    const bound = Math.max(scores[Math.floor((scores.length - 1) * 0.85)], d3.max(bests));
    const domain = padded(d3.extent([scores[0], bound]), 0.12);
    const width = column(room, 9.6, 1.1);
    const extent = d3.extent(shown.flatMap((m) => m.grid.map((g) => g[0])));
    const span = [extent[0] / 1.6, extent[1] * 1.6];
    return shown.map((m) => {
      const means = d3.sort(d3.rollups(m.grid, (v) => ({ y: d3.mean(v, (g) => g[2]), failed: v.every((g) => g[2] === null) }), (g) => g[0]), ([rate]) => rate)
        .map(([x, d]) => ({ m, x, ...d, beyond: !d.failed && d.y > domain[1] }));
      const sound = means.filter((d) => !d.failed && !d.beyond);
      const lost = means.filter((d) => d.failed || d.beyond);
      const picked = sound.filter((d) => d.x === m.rate);
      const figure = d3.create("figure").attr("data-m", m.name);
      figure.append("p").attr("class", "small").text(m.name);
      figure.append(() => plot({
        width, height: 118, marginLeft: 34, marginRight: 8, marginTop: 10, marginBottom: 22,
        style: { background: "none", color: "var(--ink)", fontSize: "10.5px" },
        x: { type: "log", domain: span, ticks: labelled(span, (width - 42) / 34), tickFormat: (t) => t.toExponential(0).replace("e-", "e−").replace("e+", "e"), label: null },
        y: { domain, ticks: 3, grid: true, label: null, tickFormat: (t) => `${+t.toPrecision(4)}` },
        marks: [
          Plot.line(means.filter((d) => !d.failed), { x: "x", y: "y", stroke: colour(m), strokeWidth: 1.5, clip: true }),
          Plot.dot(sound, { x: "x", y: "y", r: 2.8, fill: colour(m), className: "tried" }),
          Plot.dot(picked, { x: "x", y: "y", r: 6, stroke: "var(--ink)", strokeWidth: 1.4, className: "picked" }),
          Plot.text(lost, { x: "x", y: domain[1], text: (d) => (d.failed ? "×" : "↑"), dy: 6, fontSize: 13, fill: "var(--warn)", className: "lost" }),
          tip(means, { x: "x", y: (d) => (d.failed || d.beyond ? domain[1] : d.y), fontSize: 11.5, title: (d) => `rate ${d.x}\n${d.failed ? "failed" : `loss ${d.y.toFixed(3)}`}${d.x === m.rate ? ", chosen" : ""}` }),
        ],
      }));
      return figure.node();
    });
  }

  // ---- figure: ranks, a strip a method
  function ranks(box, full) {
    const known = ranked.filter((m) => m.ranks);
    if (!known.length) return null;
    const even = (m) => d3.min(m.ranks.cells, (c) => c[2]) === d3.max(m.ranks.cells, (c) => c[2]);
    const shown = known.filter((m) => !even(m));
    const same = known.filter(even).map((m) => `${m.name} ${m.ranks.cells[0][2]}`);
    const said = d3.create("p").attr("class", "caption").text(`One rank in all modules: ${same.join(", ")}.`).node();
    if (!shown.length) return said;
    const extent = d3.extent(shown.flatMap((m) => m.ranks.cells.map((c) => c[2])));
    const room = column(full, 22, 2.4);
    const strength = (rank) => 12 + (88 * (rank - Math.min(0, extent[0]))) / (extent[1] - Math.min(0, extent[0]) || 1);
    const strips = shown.map((m) => {
      const { kinds, layers, cells } = m.ranks;
      const values = cells.map((c) => c[2]);
      const figure = d3.create("figure").attr("data-m", m.name);
      figure.append("p").attr("class", "small").text(`${m.name} `).append("span").attr("class", "quiet")
        .text(`rank ${d3.min(values)} to ${d3.max(values)}, ${d3.sum(values)} in all`);
      const data = cells.map(([kind, layer, rank]) => ({ m, kind, layer: layer ?? "–", rank }));
      const left = Math.min(d3.max(kinds, (k) => k.length) * 6.6 + 12, room * 0.42);
      const cell = Math.min(46, (room - left - 4) / layers.length);
      const text = cell >= 19;
      const every = Math.ceil(20 / cell);
      figure.append(() => plot({
        width: left + cell * layers.length + 4, height: kinds.length * 20 + 24, marginLeft: left, marginRight: 4, marginTop: 2, marginBottom: 22,
        style: { background: "none", color: "var(--ink)", fontSize: "11px" },
        x: { type: "band", domain: layers.map((l) => l ?? "–"), ticks: layers.map((l) => l ?? "–").filter((_, i) => i % every === 0), tickSize: 0, label: null, padding: cell > 8 ? 0.06 : 0 },
        y: { type: "band", domain: kinds, tickSize: 0, label: null, padding: 0.08 },
        marks: [
          Plot.cell(data, { x: "layer", y: "kind", fill: (d) => `color-mix(in oklab, var(--heat) ${strength(d.rank).toFixed(0)}%, var(--paper))`, className: "cells" }),
          text ? Plot.text(data, { x: "layer", y: "kind", text: (d) => String(d.rank), fill: (d) => (strength(d.rank) > 52 ? "var(--paper)" : "var(--ink)"), fontSize: 10.5 }) : null,
          tip(data, { x: "layer", y: "kind", title: (d) => `${d.kind}${d.layer === "–" ? "" : `, layer ${d.layer}`}\nrank ${d.rank}` }),
        ],
      }));
      return figure.node();
    });
    return same.length ? [...strips, said] : strips;
  }

  const begun = ranked.filter((m) => m.mean !== null || m.grid.length || m.curves.length);
  start({ gaps, pareto, curves, forgetting, rates, ranks }, methods, begun);
})();
