// Draws the figures of a comparison of compression methods from the JSON beside it, behind figures.js.
const { keeps, corpora, dense, methods } = JSON.parse(document.getElementById("study-data").textContent);
let shownKeep = keeps[Math.floor(keeps.length / 2)];

// ---- figure: perplexity against what a model costs, a line a method through its shares
const BYTES = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]];
const TIMES = { label: "Tokens a second, times the dense model's", units: [[1, ""]] };
const AXES = {
  bytes: { label: "Stored", units: BYTES },
  read_bytes: { label: "Read for a token", units: BYTES },
  decode1: TIMES,
  decode16: TIMES,
  prefill1: TIMES,
  prefill16: TIMES,
};
const CEILING = 1000; // times the dense model's perplexity: what lies above is drawn at the edge

function trade(box, width) {
  const { cost, corpus } = box.dataset;
  const axis = AXES[cost];
  const found = methods.flatMap((m) => m.points.filter((p) => p[cost] > 0).map((p) => ({ m, p, y: p.y[corpus] })));
  if (!found.some((d) => d.y !== null)) return null;
  const reference = dense?.y[corpus] ?? null;
  const most = d3.max([...found.map((d) => d.p[cost]), dense?.[cost] ?? 0]);
  const [divisor, unit] = axis.units.find(([size]) => most >= size) ?? axis.units.at(-1);
  const sound = found.map((d) => d.y).filter((y) => y !== null);
  const edge = reference === null ? d3.max(sound) : Math.min(d3.max(sound), CEILING * reference);
  const points = found.map((d) => ({ ...d, x: d.p[cost] / divisor, y: Math.min(d.y ?? edge, edge), beyond: d.y === null || d.y > edge }));
  const low = d3.min([...points.map((d) => d.y), reference ?? Infinity]);
  const log = edge / low > 4;
  const yDomain = log ? [low / 1.25, edge * 1.25] : padded([low, Math.max(edge, low * 1.02)], 0.08);
  const own = dense && dense[cost] > 0 ? [{ x: dense[cost] / divisor, y: reference }] : [];
  const xDomain = padded(d3.extent([...points, ...own], (d) => d.x), 0.09);
  const lines = reference === null ? [] : [{ y: reference, text: "dense", dash: "5 4", dy: 9 }, { y: 2 * reference, text: "2 × dense", dash: "1 4", dy: -7 }].filter((d) => inside(d.y, yDomain));
  const base = {
    width, height: Math.round(Math.min(380, Math.max(300, width * 0.7))), marginLeft: 50, marginRight: 14, marginTop: 14, marginBottom: 42,
    x: { domain: xDomain, ticks: Math.max(3, width / 95), label: unit ? `${axis.label} (${unit})` : axis.label, labelAnchor: "center", labelArrow: "none" },
    y: { type: log ? "log" : "linear", domain: yDomain, grid: true, ticks: log ? ticks(yDomain, true) : 6, tickFormat: log ? (t) => d3.format(t < 1e4 ? "~r" : "~s")(+t.toPrecision(3)) : undefined, label: null },
  };
  const by = { x: "x", y: "y", stroke: (d) => colour(d.m), strokeDasharray: (d) => dash(d.m) };
  const solid = points.filter((d) => !d.p.collapsed[corpus]);
  const hollow = points.filter((d) => d.p.collapsed[corpus]);
  const marks = [
    ...lines.map((d) => Plot.ruleY([d], { y: "y", stroke: "var(--reference)", strokeDasharray: d.dash })),
    ...lines.map((d) => Plot.text([d], { y: "y", text: "text", frameAnchor: "left", textAnchor: "start", dx: 5, dy: d.dy, fill: "var(--reference)", stroke: "var(--paper)", strokeWidth: 3 })),
    Plot.dot(own, { x: "x", y: "y", r: 5, stroke: "var(--reference)", strokeWidth: 1.6, className: "dense" }),
    ...methods.map((m) => { const mine = d3.sort(points.filter((d) => d.m === m), (d) => d.p.keep); return named(Plot.line(mine, { ...by, stroke: colour(m), strokeDasharray: dash(m), strokeWidth: 1.6, strokeOpacity: 0.75, className: "line" }), mine); }),
    named(Plot.dot(hollow, { x: "x", y: "y", r: 4.6, symbol: (d) => symbol(d.m), fill: "var(--paper)", stroke: (d) => colour(d.m), strokeWidth: 1.5, className: "points" }), hollow),
    named(Plot.dot(solid, { x: "x", y: "y", r: 5.2, symbol: (d) => symbol(d.m), fill: (d) => colour(d.m), stroke: "var(--paper)", strokeWidth: 0.8, className: "points" }), solid),
    Plot.text(points.filter((d) => d.beyond), { x: "x", y: "y", text: () => "↑", dy: -12, fill: "var(--warn)" }),
  ];
  // one name a line, at the point of its smallest share
  const ends = methods.flatMap((m) => d3.sort(points.filter((d) => d.m === m), (d) => d.p.keep).slice(0, 1));
  const others = points.filter((d) => !ends.includes(d)).map((d) => ({ ...d, quiet: true }));
  const labels = place([...ends, ...others], plot({ ...base, marks }), width, base.height, ends).filter(({ p }) => !p.quiet).map(({ p, dx, dy, anchor }) =>
    named(Plot.text([p], { x: "x", y: "y", text: (d) => d.m.name, dx, dy, textAnchor: anchor, fill: "var(--ink)", stroke: "var(--paper)", strokeWidth: 3, className: "names" }), [p]));
  return plot({ ...base, marks: [...marks, ...labels, tip(points, { x: "x", y: "y", title: (d) => told(d, cost, corpus) })] });
}
function told({ m, p }, cost, corpus) {
  const speed = cost in p.text.speeds ? `\n${p.text.speeds[cost]} tokens/s, × ${p[cost].toFixed(2)}` : "";
  return `${m.name} at ${p.keep}${p.text.state ? ` · ${p.text.state}` : ""}\nperplexity ${p.text.y[corpus]}\n${p.text.costs}${speed}`;
}

// ---- figures: a map of the layers a method, at the chosen share
function maps(full, value, strength, word, caption) {
  const shown = methods.flatMap((m) => m.points.filter((p) => p.keep === shownKeep && p.layers).map((p) => ({ m, p })));
  const made = shown.flatMap(({ m, p }) => {
    const { kinds, layers, cells } = p.layers;
    const known = cells.filter(([, , entry]) => value(entry) !== null);
    if (!known.length) return [];
    const figure = d3.create("figure").attr("data-m", m.name);
    figure.append("p").attr("class", "small").text(`${m.name} `).append("span").attr("class", "quiet").text(caption(known.map(([, , entry]) => value(entry))));
    const data = cells.map(([kind, layer, entry]) => ({ m, kind, layer: layer ?? "–", entry, s: strength(entry, known) }));
    const room = column(full, 22, 2.4);
    const left = Math.min(d3.max(kinds, (k) => k.length) * 6.6 + 12, room * 0.42);
    const cell = Math.min(46, (room - left - 4) / layers.length);
    const names = layers.map((l) => l ?? "–");
    const text = cell >= 24;
    figure.append(() => plot({
      width: left + cell * layers.length + 4, height: kinds.length * 20 + 24, marginLeft: left, marginRight: 4, marginTop: 2, marginBottom: 22,
      style: { background: "none", color: "var(--ink)", fontSize: "11px" },
      x: { type: "band", domain: names, ticks: names.filter((_, i) => i % Math.ceil(20 / cell) === 0), tickSize: 0, label: null, padding: cell > 8 ? 0.06 : 0 },
      y: { type: "band", domain: kinds, tickSize: 0, label: null, padding: 0.08 },
      marks: [
        Plot.cell(data, { x: "layer", y: "kind", fill: (d) => `color-mix(in oklab, var(--heat) ${d.s.toFixed(0)}%, var(--paper))`, className: "cells" }),
        text ? Plot.text(data, { x: "layer", y: "kind", text: (d) => word(d.entry), fill: (d) => (d.s > 52 ? "var(--paper)" : "var(--ink)"), fontSize: 10 }) : null,
        tip(data, { x: "layer", y: "kind", title: (d) => `${d.kind}${d.layer === "–" ? "" : `, layer ${d.layer}`}\n${layerWords(d.entry)}` }),
      ],
    }));
    return [figure.node()];
  });
  return made.length ? made : null;
}
const layerWords = ([size, kept, error]) =>
  size === null ? "left dense" : `size ${size}, ${kept} of its bits${error === null ? "" : `\nerror ${d3.format(".3~g")(error)}`}`;
const brief = (error) => (error === null ? "" : error >= 0.0995 ? error.toFixed(2).replace(/^0/, "") : error >= 0.00095 ? error.toFixed(3).replace(/^0/, "") : error === 0 ? "0" : "<.001");

function sizes(box, full) {
  return maps(full, ([size, kept]) => kept, ([, kept]) => 8 + 92 * Math.min(kept, 1), ([size]) => (size === null ? "–" : String(size)),
    (values) => `${d3.format(".3~f")(d3.min(values))} to ${d3.format(".3~f")(d3.max(values))} of the bits`);
}
function errorsOf(box, full) {
  return maps(full, ([size, , error]) => (size === null ? null : error), ([size, , error], known) => (size === null || error === null ? 0 : 6 + (94 * error) / (d3.max(known, ([, , entry]) => entry[2]) || 1)),
    ([size, , error]) => (size === null ? "–" : brief(error)), (values) => `${d3.format(".2~g")(d3.min(values))} to ${d3.format(".2~g")(d3.max(values))}`);
}

for (const keep of keeps) {
  const button = d3.select("#keeps").append("button").attr("type", "button").attr("value", keep).attr("aria-pressed", String(keep === shownKeep)).text(`keep ${keep}`);
  button.on("click", () => {
    shownKeep = keep;
    for (const each of document.querySelectorAll("#keeps button")) each.setAttribute("aria-pressed", String(+each.value === keep));
    draw();
  });
}
start({ trade, sizes, errors: errorsOf }, methods, methods.filter((m) => m.points.length));
