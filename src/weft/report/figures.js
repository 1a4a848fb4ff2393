// What the figures of all reports share, with the globals Plot (Observable Plot) and d3. Colours are CSS variables, so
// that the figures follow the reader's light or dark scheme, and print, without being drawn again. The page's own script
// comes behind this one, in the same module, and ends in `start`.
const root = document.documentElement;
const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "wye", "cross"];
const errors = [];
addEventListener("error", (event) => note(event.message));

const colour = (m) => (m.reference ? "var(--reference)" : `var(--c${m.index % 8})`);
const symbol = (m) => SYMBOLS[m.index % SYMBOLS.length]; // 8 colours, 7 markers: 56 methods before a pair repeats
const dash = (m) => ["none", "5 3", "2 3"][Math.floor(m.index / 8) % 3];

function note(message) {
  errors.push(message);
  root.dataset.errors = errors.join(" | ");
}

// ---- the one highlighted method, in every figure at once
let chosen = null;
function highlight(name) {
  for (const node of document.querySelectorAll("[data-m]"))
    node.classList.toggle("dim", name !== null && node.dataset.m !== name);
}
function choose(name) {
  chosen = chosen === name ? null : name;
  for (const button of document.querySelectorAll("#legend button"))
    button.setAttribute("aria-pressed", String(button.value === chosen));
  highlight(chosen);
}

function glyph(m, size = 9) {
  const shape = d3[`symbol${symbol(m)[0].toUpperCase()}${symbol(m).slice(1)}`];
  const svg = d3.create("svg").attr("width", size + 2).attr("height", size + 2).attr("aria-hidden", "true");
  svg.append("path").attr("transform", `translate(${size / 2 + 1},${size / 2 + 1})`).attr("d", d3.symbol(shape, size * 5)())
    .attr("fill", m.reference ? "none" : colour(m)).attr("stroke", colour(m)).attr("stroke-width", m.reference ? 1.4 : 0);
  return svg.node();
}

// ---- plotting: shared defaults, the name of its method on each mark, and tips that a finger can read
function plot(options) {
  const svg = Plot.plot({
    style: { background: "none", color: "var(--ink)", fontSize: "12px" },
    color: { type: "identity" },
    symbol: { type: "identity" },
    ...options,
  });
  // Plot ends a tip with the pointer's leaving; a finger leaves when it is lifted, before anything could be read
  svg.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "touch") event.stopImmediatePropagation();
  }, true);
  return svg;
}
addEventListener("pointerdown", (event) => {
  if (event.pointerType !== "touch") return;
  for (const svg of document.querySelectorAll("[data-figure] svg"))
    if (!svg.contains(event.target)) svg.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
});

// a mark whose elements carry data-m: Plot binds to each element its index, or the indexes of its line
function named(mark, data, name = (d) => d.m.name) {
  const render = mark.render;
  mark.render = function (...args) {
    const g = render.apply(this, args);
    d3.select(g).selectAll("path, line, circle, rect, text").each(function (i) {
      const at = Array.isArray(i) || ArrayBuffer.isView(i) ? i[0] : i;
      if (data[at] !== undefined) this.dataset.m = name(data[at]);
    });
    return g;
  };
  return mark;
}
const tip = (data, options) =>
  Plot.tip(data, Plot.pointer({ maxRadius: 60, fontSize: 12.5, lineHeight: 1.35, pathFilter: "none", stroke: "var(--soft)", strokeOpacity: 0.5, fill: "var(--paper)", textPadding: 9, ...options }));

function padded([low, high], part) {
  const pad = (high - low) * part || Math.abs(high) * 0.02 || 1;
  return [low - pad, high + pad];
}
const nameMargin = (names, width) => Math.ceil(Math.min(d3.max(names, (name) => name.length) * 7.2 + 14, width * 0.4));
const inside = (value, [low, high]) => value !== null && value >= low && value <= high;

function ticks([low, high], log) {
  if (!log) return undefined;
  const steps = high / low > 400 ? [1] : high / low > 40 ? [1, 3] : [1, 2, 5];
  return d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1)
    .flatMap((e) => steps.map((s) => s * 10 ** e)).filter((t) => t >= low && t <= high);
}

// ticks of a log axis on which `most` labels have room: powers of ten, evenly thinned where even those are too many
function labelled(domain, most) {
  const all = ticks(domain, true);
  if (all.length <= most) return all;
  const powers = all.filter((t) => Math.abs(Math.log10(t) - Math.round(Math.log10(t))) < 1e-9);
  return powers.length ? powers.filter((_, i) => i % Math.ceil(powers.length / most) === 0) : all.slice(0, most);
}

// names beside their points ({m, x, y}) where they fit, those in `first` first; the rest is in the legend and the tips
function place(points, svg, width, height, first) {
  const [x, y] = [svg.scale("x"), svg.scale("y")];
  const at = (p) => [x.apply(p.x), y.apply(p.y)];
  const taken = points.map((p) => { const [cx, cy] = at(p); return [cx - 7, cy - 7, cx + 7, cy + 7]; });
  const labels = [];
  for (const p of d3.sort(points, (q) => !first.includes(q))) {
    const [cx, cy] = at(p);
    const w = p.m.name.length * 6.7;
    for (const [dx, dy, anchor] of [[9, 0, "start"], [-9, 0, "end"], [0, -14, "middle"], [0, 14, "middle"], [8, -11, "start"], [8, 11, "start"], [-8, -11, "end"], [-8, 11, "end"]]) {
      const left = cx + dx - (anchor === "end" ? w : anchor === "middle" ? w / 2 : 0);
      const boxed = [left, cy + dy - 7, left + w, cy + dy + 7];
      if (boxed[0] < 46 || boxed[2] > width - 2 || boxed[1] < 2 || boxed[3] > height - 40) continue;
      if (taken.some((t) => boxed[0] < t[2] && boxed[2] > t[0] && boxed[1] < t[3] && boxed[3] > t[1])) continue;
      taken.push(boxed);
      labels.push({ p, dx, dy, anchor });
      break;
    }
  }
  return labels;
}

// the width of a column of the style sheet's grid, `least` and `gap` in rem
function column(full, least, gap) {
  const rem = parseFloat(getComputedStyle(root).fontSize);
  const columns = Math.max(1, Math.floor((full + gap * rem) / ((least + gap) * rem)));
  return Math.floor((full - gap * rem * (columns - 1)) / columns);
}

// ---- drawing all of it, again whenever the width changes
const PAGE = 690; // CSS pixels across A4 or Letter between usual margins
let figures = {}; // data-figure → function (box, width) that makes it: an element, several, or null where there is nothing
let legend = 0;

function draw(printing = false) {
  let drawn = 0;
  for (const box of document.querySelectorAll("[data-figure]")) {
    const target = box.querySelector(":scope > .plot") ?? box;
    box.hidden = false;
    if (box.closest("section")) box.closest("section").hidden = false;
    let made;
    try {
      const paper = box.closest(".two") ? PAGE / 2 - 20 : PAGE;
      made = figures[box.dataset.figure](box, Math.floor(printing ? paper : target.clientWidth));
    } catch (error) {
      note(`${box.dataset.figure}: ${error.message}`);
      made = d3.create("p").attr("class", "notice").text(`This figure could not be drawn: ${error.message}`).node();
    }
    box.hidden = made === null;
    target.replaceChildren(...(made === null ? [] : [made].flat()));
    drawn += made !== null;
  }
  for (const section of document.querySelectorAll("[data-section]"))
    section.hidden = [...section.querySelectorAll("[data-figure]")].every((box) => box.hidden);
  document.getElementById("legend").hidden = legend < 2 || drawn === 0;
  highlight(chosen);
  root.dataset.figures = String(drawn);
  root.dataset.overflow = String(root.scrollWidth - root.clientWidth); // wider than the window: a fault of the layout
}

// draw `made` by name; `methods` have glyphs, and those of them that have begun a place in the legend
function start(made, methods, begun) {
  figures = made;
  legend = begun.length;
  for (const place of document.querySelectorAll("[data-glyph]")) {
    const m = methods.find((each) => each.name === place.dataset.glyph);
    if (m) place.append(glyph(m));
  }
  for (const m of begun) {
    const button = d3.select("#legend").append("button").attr("type", "button").attr("aria-pressed", "false").attr("value", m.name);
    button.append(() => glyph(m, 10));
    button.append("span").text(` ${m.name}`);
    button.on("click", () => choose(m.name))
      .on("pointerenter", (event) => event.pointerType === "mouse" && highlight(m.name))
      .on("pointerleave", () => highlight(chosen))
      .on("focus", () => highlight(m.name)).on("blur", () => highlight(chosen));
  }
  let width = 0;
  let waiting;
  new ResizeObserver(() => {
    if (root.clientWidth === width) return;
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (matchMedia("print").matches) return; width = root.clientWidth; draw(); }, 80);
  }).observe(document.body);
  addEventListener("beforeprint", () => draw(true));
  addEventListener("afterprint", () => draw());
  width = root.clientWidth;
  draw();
}
