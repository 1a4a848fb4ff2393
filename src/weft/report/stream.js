// Draws the matrix of a stream of tasks from the JSON beside it, behind figures.js.
(() => {
  const { tasks, states, matrix, shown, better } = JSON.parse(document.getElementById("study-data").textContent);

  function heat(box, width) {
    const sign = better === "higher" ? 1 : -1;
    const extents = tasks.map((_, j) => d3.extent(matrix, (row) => sign * row[j]));
    const data = states.flatMap((state, i) => tasks.map((task, j) => {
      const [low, high] = extents[j];
      const strength = 8 + (84 * (sign * matrix[i][j] - low)) / (high - low || 1);
      return { state, task, text: shown[i][j], strength, trained: j < i, own: j === i - 1 };
    }));
    const left = nameMargin(states, width);
    const cell = Math.min(120, (width - left - 4) / tasks.length);
    const high = 34;
    const letters = Math.max(3, Math.floor(cell / 7));
    const cut = (name) => (name.length > letters ? `${name.slice(0, letters - 1)}…` : name);
    return plot({
      width: left + cell * tasks.length + 4, height: states.length * high + 30, marginLeft: left, marginRight: 4, marginTop: 26, marginBottom: 4,
      x: { type: "band", domain: tasks, axis: "top", tickSize: 0, label: null, padding: 0.05, tickFormat: cut },
      y: { type: "band", domain: states, tickSize: 0, label: null, padding: 0.07 },
      marks: [
        Plot.cell(data, { x: "task", y: "state", fill: (d) => `color-mix(in oklab, var(--heat) ${(d.strength * (d.trained ? 1 : 0.4)).toFixed(0)}%, var(--paper))`, className: "cells" }),
        Plot.cell(data.filter((d) => d.own), { x: "task", y: "state", fill: "none", stroke: "var(--ink)", strokeWidth: 1.5, className: "own" }),
        cell >= 34 ? Plot.text(data, { x: "task", y: "state", text: "text", fill: (d) => (d.strength * (d.trained ? 1 : 0.4) > 52 ? "var(--paper)" : "var(--ink)"), fontSize: cell < 50 ? 10 : 12 }) : null,
        tip(data, { x: "task", y: "state", title: (d) => `${d.task} after ${d.state}\n${d.text}${d.trained ? "" : ", not trained yet"}` }),
      ],
    });
  }
  start({ heat }, [], []);
})();
