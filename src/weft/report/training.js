// Draws the figures of one training run from the JSON beside it, behind figures.js.
(() => {
  const { figures: lines } = JSON.parse(document.getElementById("study-data").textContent);
  const stroke = { training: "var(--c0)", validation: "var(--c1)", "": "var(--c0)" };

  function line(box, width) {
    const key = box.dataset.key;
    const data = lines[key].flatMap((each) => each.points.map(([x, y]) => ({ name: each.name, x, y })));
    if (data.length < 2) return null;
    const values = d3.sort(data.map((d) => d.y));
    const high = key === "loss" ? Math.max(d3.quantileSorted(values, 0.97), data.at(-1).y) : values.at(-1); // the first steps would flatten the rest
    const ends = lines[key].filter((each) => each.name).map((each) => ({ name: each.name, x: each.points.at(-1)[0], y: each.points.at(-1)[1] }));
    return plot({
      width, height: key === "loss" ? 320 : 180, marginLeft: 62, marginRight: ends.length ? 78 : 14, marginTop: 12, marginBottom: 42,
      x: { label: "Step", labelAnchor: "center", labelArrow: "none", ticks: Math.max(3, width / 95) },
      y: { domain: padded([key === "loss" ? values[0] : 0, high], 0.04), grid: true, ticks: key === "loss" ? 6 : 4, label: null, tickFormat: key === "learning_rate" ? (rate) => (rate ? d3.format("~e")(rate) : "0") : undefined },
      marks: [
        Plot.line(data, { x: "x", y: "y", z: "name", stroke: (d) => stroke[d.name], strokeWidth: 2, clip: true, className: "curve" }),
        Plot.dot(data.filter((d) => d.name === "validation"), { x: "x", y: "y", r: 3, fill: stroke.validation }),
        Plot.text(spread(ends, high - values[0]), { x: "x", y: "y", text: "name", textAnchor: "start", dx: 8, fill: (d) => stroke[d.name] }),
        tip(data, { x: "x", y: "y", title: (d) => `step ${d.x}\n${d.name ? `${d.name} ` : ""}${key === "loss" ? d.y.toFixed(3) : d3.format(".4~g")(d.y)}` }),
      ],
    });
  }
  // two names at one height would lie on each other
  function spread(ends, span) {
    if (ends.length === 2 && Math.abs(ends[0].y - ends[1].y) < span * 0.06) {
      const middle = d3.mean(ends, (d) => d.y);
      const [low, top] = d3.sort(ends, (d) => d.y);
      low.y = middle - span * 0.03;
      top.y = middle + span * 0.03;
    }
    return ends;
  }
  start({ line }, [], []);
})();
