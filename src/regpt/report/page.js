// The report's script: draws the charts at the window's width, over the axis that is asked for, smoothed on demand.
"use strict";
(() => {
  const LEFT = 58, RIGHT = 14, TOP = 12, BOTTOM = 44, LABEL_HEIGHT = 14, TICK_WIDTH = 95, AXES = ["step", "tokens", "time_s", "flops"];
  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);
  let data = JSON.parse(byId("data").textContent);
  const state = { axis: "step", smooth: 0, log: false, outliers: false, hidden: new Set(), zoom: null };

  // --- numbers; as in charts.py -------------------------------------------------------------------------------------------------------

  // Whether two numbers differ by nothing but rounding, or by too little to be divided.
  const FLAT = 1e-9, SMALLEST = 1e-290;
  const flat = (low, high) => !(high - low > Math.max(FLAT * Math.max(Math.abs(low), Math.abs(high)), SMALLEST));

  function ticks(low, high, about) {
    const span = high - low;
    if (flat(low, high)) return [low];
    const power = 10 ** Math.floor(Math.log10(span / about));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => span / s <= about);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) found.push(i * step);
    return found;
  }

  function logTicks(low, high) {
    const found = [], first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const decades = Math.max(1, Math.ceil((last - first) / 8)); // from one label to the next, where there are many
    for (let p = first; p <= last; p += decades)
      for (const m of decades > 1 ? [1] : [1, 2, 5]) if (m * 10 ** p >= low && m * 10 ** p <= high) found.push(m * 10 ** p);
    return found.length > 1 ? found : ticks(low, high, 5).filter((t) => t > 0);
  }

  function said(v) {
    const size = Math.abs(v);
    if (size >= 1e12 || (size > 0 && size < 1e-3)) return exponent(v);
    for (const [from, unit, letter] of [[1e9, 1e9, "B"], [1e6, 1e6, "M"], [1e4, 1e3, "K"]])
      if (size >= from) return parseFloat((v / unit).toPrecision(4)) + letter;
    return String(parseFloat(v.toPrecision(4)));
  }

  function exponent(v) {
    const [m, p] = v.toExponential(2).split("e");
    return v ? `${parseFloat(m)}e${parseInt(p, 10)}` : "0";
  }

  // Ticks as one scale has them, all in the same unit and with the same digits.
  function labels(at) {
    const size = Math.max(0, ...at.map(Math.abs));
    if (at.length < 2 || size >= 1e12 || size < 1e-3) return at.map(said);
    const [unit, letter] = size >= 1e9 ? [1e9, "B"] : size >= 1e6 ? [1e6, "M"] : size >= 1e4 ? [1e3, "K"] : [1, ""];
    const digits = Math.max(0, -Math.floor(Math.log10((at[1] - at[0]) / unit) + 1e-9));
    return at.map((t) => (t ? (t / unit).toFixed(digits) + letter : "0"));
  }

  function timeUnit(seconds) {
    if (seconds > 3 * 86400) return [86400, "days"];
    if (seconds > 3 * 3600) return [3600, "hours"];
    return seconds > 300 ? [60, "minutes"] : [1, "seconds"];
  }

  // [its divisor, its name] of the axis that is shown
  function axisUnit(end) {
    if (state.axis === "time_s") { const [by, name] = timeUnit(end); return [by, `training time, ${name}`]; }
    return [1, { step: "steps", tokens: "tokens", flops: "FLOPs" }[state.axis]];
  }

  function xs(points, line) {
    if (state.axis !== "flops") return points[state.axis];
    const each = data.runs[line.run].flops_per_token;
    return points.tokens.map((t) => t * each);
  }

  // An exponential moving average whose half-life is counted in steps, so it does not depend on how often was logged.
  // Each point weighs as much as the steps since the one before it; the first as if there had been one before it too.
  function smoothed(points, halfLife) {
    const known = points.step.filter((_, i) => points.y[i] !== null);
    let sum = 0, weight = 0, before = known.length > 1 ? 2 * known[0] - known[1] : known[0] - 1;
    return points.y.map((y, i) => {
      if (y === null) return null;
      const keep = 0.5 ** ((points.step[i] - before) / halfLife);
      before = points.step[i];
      sum = keep * sum + (1 - keep) * y;
      weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  }

  // --- drawing -------------------------------------------------------------------------------------------------------

  function node(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // A shape for each run, so that not colour alone tells them apart; as `marker` of charts.py.
  const SHAPES = [null, "M-3,-3h6v6h-6z", "M0,-4L4,3H-4z", "M0,-4.4L4.4,0L0,4.4L-4.4,0z"];
  function marker(run, x, y, style) {
    const shape = SHAPES[run % SHAPES.length], [left, top] = [x.toFixed(1), y.toFixed(1)];
    if (shape === null) return node("circle", { cx: left, cy: top, r: 3, style });
    return node("path", { class: "marker", d: shape, transform: `translate(${left},${top})`, style });
  }

  const visible = (chart) => chart.lines.filter(
    (l) => !state.hidden.has(`run:${l.run}`) && !state.hidden.has(`line:${chart.id}:${l.part}`)
      && (state.axis !== "flops" || data.runs[l.run].flops_per_token !== null));

  function curves(chart) {
    const steps = Math.max(1, ...chart.lines.map((l) => l.step[l.step.length - 1]));
    const made = [];
    for (const line of visible(chart)) {
      const smooth = state.smooth > 0 && line.kind === "noisy";
      made.push({ line, x: xs(line, line), y: line.y, style: smooth ? "raw" : line.kind });
      if (smooth) {
        const from = line.mean || line;
        made.push({ line, x: xs(from, line), y: smoothed(from, state.smooth * steps), style: "smooth" });
      }
    }
    return made;
  }

  // Without spreading arrays into arguments, of which there are too many.
  function extent(arrays, keep) {
    let low = Infinity, high = -Infinity;
    for (const { x, y, line } of arrays)
      for (let i = 0; i < y.length; i++) {
        if (y[i] === null || !keep(x[i], y[i])) continue;
        const error = (line.error && line.error[i]) || 0;
        low = Math.min(low, keep(x[i], y[i] - error) ? y[i] - error : y[i]);
        high = Math.max(high, y[i] + error);
      }
    return [low, high];
  }

  // The highest value but for the top twentieth of the points that a curve is drawn through, where they are many: its
  // beginning and its spikes, as a rule. A thinned curve is drawn through extremes, so of its log that may be another share.
  const MANY = 200, LEFT_OUT = 0.05;
  function ordinaryTop(drawn, keep) {
    let top = -Infinity;
    for (const { x, y, style } of drawn) {
      const values = y.filter((v, i) => v !== null && keep(x[i], v)).sort((p, q) => p - q);
      if (style === "sparse" && drawn.some((c) => c.y.length > MANY)) continue;
      if (!values.length) continue;
      const cut = values.length > MANY ? Math.floor(values.length * (1 - LEFT_OUT)) : values.length - 1;
      top = Math.max(top, values[cut]);
    }
    return top;
  }

  // A place far outside of the picture is as good as one farther, which SVG could not say.
  const FAR = 1e6;
  const pixel = (v) => Math.min(FAR, Math.max(-FAR, v));

  function scales(chart, drawn, width, height) {
    let end = 0;
    for (const other of data.charts)
      for (const line of visible(other)) {
        const x = xs(line, line);
        end = Math.max(end, x[x.length - 1]);
      }
    const [from, to] = state.zoom || [0, end || 1];
    const log = state.log && chart.log;
    const keep = (x, y) => x >= from && x <= to && (!log || y > 0);
    let [low, high] = extent(drawn, keep);
    if (!state.outliers && drawn.some((c) => c.line.kind === "noisy")) {
      const top = ordinaryTop(drawn, keep);
      if (top > low) high = Math.min(high, top + 0.25 * (top - low));
    }
    for (const b of chart.baselines) { low = Math.min(low, b.value); high = Math.max(high, b.value); }
    if (low > high) [low, high] = log ? [0.1, 1] : [0, 1];
    const f = log ? Math.log : (v) => v;
    let a = f(low), b = f(high);
    const pad = flat(a, b) ? (Math.abs(b) > SMALLEST ? Math.abs(b) * 0.05 : 1) : (b - a) * 0.05;
    a -= pad; b += pad;
    const plotWidth = width - LEFT - RIGHT, plotHeight = height - TOP - BOTTOM;
    return {
      from, to, end, log, low: log ? Math.max(Math.exp(a), Number.MIN_VALUE) : a, high: log ? Math.min(Math.exp(b), Number.MAX_VALUE) : b,
      x: (v) => pixel(LEFT + plotWidth * ((v - from) / (to - from))),
      y: (v) => pixel(TOP + plotHeight * ((b - f(v)) / (b - a))),
      back: (px) => from + (to - from) * (px - LEFT) / plotWidth,
    };
  }

  function pathOf(curve, s) {
    let d = "", pen = "M";
    for (let i = 0; i < curve.x.length; i++) {
      const y = curve.y[i];
      if (y === null || curve.x[i] === null || (s.log && y <= 0)) { pen = "M"; continue; }
      if (i + 1 < curve.x.length && curve.x[i + 1] < s.from) continue;
      if (i > 0 && curve.x[i - 1] > s.to) break;
      d += `${pen}${s.x(curve.x[i]).toFixed(1)},${s.y(y).toFixed(1)}`;
      pen = "L";
    }
    return d;
  }

  function draw(chart) {
    const plot = document.querySelector(`[data-plot="${CSS.escape(chart.id)}"]`);
    if (!plot) return;
    const width = Math.max(240, plot.clientWidth);
    const height = Math.round(chart.wide ? Math.min(400, Math.max(260, width * 0.42)) : Math.min(240, Math.max(190, width * 0.5)));
    const drawn = curves(chart), s = scales(chart, drawn, width, height);
    const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${chart.title} over ${axisUnit(s.end)[1]}` });
    const clip = node("clipPath", { id: `clip-${chart.id}` });
    clip.append(node("rect", { x: LEFT - 4, y: TOP - 4, width: width - LEFT - RIGHT + 8, height: height - TOP - BOTTOM + 8 }));
    svg.append(clip);
    const atY = s.log ? logTicks(s.low, s.high) : ticks(s.low, s.high, 6), saidY = s.log ? atY.map(said) : labels(atY);
    atY.forEach((t, i) => {
      svg.append(node("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: s.y(t), y2: s.y(t) }));
      svg.append(node("text", { class: "tick", x: LEFT - 8, y: s.y(t) + 4, "text-anchor": "end" }, saidY[i]));
    });
    const [by, unit] = axisUnit(s.end);
    const atX = ticks(s.from / by, s.to / by, Math.max(2, Math.floor(width / TICK_WIDTH)));
    const saidX = state.axis === "flops" ? atX.map(exponent) : labels(atX);
    atX.forEach((t, i) =>
      svg.append(node("text", { class: "tick", x: s.x(t * by), y: height - 25, "text-anchor": "middle" }, saidX[i])));
    svg.append(node("text", { class: "tick", x: (LEFT + width - RIGHT) / 2, y: height - 6, "text-anchor": "middle" }, unit));
    const inside = node("g", { "clip-path": `url(#clip-${chart.id})` });
    const faded = data.runs.length > 1 && chart.lines.some((l) => l.kind === "sparse");
    for (const curve of drawn) {
      const colour = `var(--c${curve.line.colour})`, soft = faded && curve.style === "noisy" ? " faded" : "";
      const dotted = curve.line.second ? " second" : "";
      inside.append(node("path", { class: `line ${curve.style}${soft}${dotted}`, style: `stroke:${colour}`, d: pathOf(curve, s) }));
      if (curve.style !== "sparse" || curve.x.length > 150) continue;
      for (let i = 0; i < curve.x.length; i++)
        if (curve.y[i] !== null && curve.x[i] >= s.from && curve.x[i] <= s.to && !(s.log && curve.y[i] <= 0)) {
          const x = s.x(curve.x[i]), error = curve.line.error && curve.line.error[i];
          if (error) { // one standard error to either side
            const [y1, y2] = [curve.y[i] - error, curve.y[i] + error].map((v) => s.y(s.log ? Math.max(v, s.low) : v));
            inside.append(node("line", { class: "error", x1: x, x2: x, y1, y2, style: `stroke:${colour}` }));
          }
          inside.append(marker(curve.line.run, x, s.y(curve.y[i]), `fill:${colour}`));
        }
    }
    svg.append(inside);
    const baselines = [...chart.baselines].sort((p, q) => p.value - q.value);
    for (const { value } of baselines)
      svg.append(node("line", { class: "baseline", x1: LEFT, x2: width - RIGHT, y1: s.y(value), y2: s.y(value) }));
    let above = Infinity; // the lowest first, each label over the one before
    for (const { label, value } of baselines) {
      above = Math.min(s.y(value) - 5, above - LABEL_HEIGHT);
      svg.append(node("text", { class: "baseline-label", x: LEFT + 6, y: above }, `${label} ${said(value)}`));
    }
    const old = plot.querySelector("svg");
    if (old) old.replaceWith(svg); else plot.prepend(svg);
    plot.scene = { chart, drawn, s, svg, width, height };
  }

  function drawAll() {
    data.charts.forEach(draw);
    const x = byId("axis-name");
    if (x) x.textContent = state.zoom ? "shown: a part; double-click shows all" : "drag over a chart to enlarge a part of it";
    byId("zoom-out").hidden = !state.zoom;
  }

  // --- reading a value -------------------------------------------------------------------------------------------------

  function nearest(x, at) {
    let low = 0, high = x.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (x[mid] < at) low = mid; else high = mid; }
    return Math.abs(x[low] - at) <= Math.abs(x[high] - at) ? low : high;
  }

  function tell(plot, px) {
    const { chart, drawn, s, svg, width, height } = plot.scene;
    const at = Math.min(s.to, Math.max(s.from, s.back(px))), tip = plot.querySelector(".tip");
    svg.querySelectorAll(".cursor").forEach((c) => c.remove());
    svg.append(node("line", { class: "cursor", x1: s.x(at), x2: s.x(at), y1: TOP, y2: height - BOTTOM }));
    const [by, unit] = axisUnit(s.end);
    tip.replaceChildren(`${state.axis === "step" ? Math.round(at).toLocaleString("en") : said(at / by)} ${unit}`);
    for (const curve of drawn) {
      if (curve.style === "raw" || !curve.x.length) continue;
      const i = nearest(curve.x, at);
      if (curve.y[i] === null) continue;
      const row = document.createElement("div"), dot = document.createElement("i");
      dot.style.background = `var(--c${curve.line.colour})`;
      const step = curve.style === "sparse" ? ` at step ${(curve.line.step[i] || 0).toLocaleString("en")}` : "";
      const error = curve.line.error && curve.line.error[i] ? ` ± ${said(curve.line.error[i])}` : "";
      row.append(dot, `${curve.line.name} ${said(curve.y[i])}${error}${step}`);
      tip.append(row);
    }
    tip.hidden = false;
    const left = s.x(at) > width / 2;
    tip.style.left = left ? "auto" : `${s.x(at) + 12}px`;
    tip.style.right = left ? `${width - s.x(at) + 12}px` : "auto";
    plot.at = px;
  }

  function hush(plot) {
    plot.querySelector(".tip").hidden = true;
    plot.scene.svg.querySelectorAll(".cursor, .zoom").forEach((c) => c.remove());
  }

  function listen(plot) {
    let began = null;
    const place = (e) => (e.clientX - plot.getBoundingClientRect().left);
    plot.addEventListener("pointermove", (e) => {
      tell(plot, place(e));
      if (began === null) return;
      const { svg, height } = plot.scene, [a, b] = [began, place(e)].sort((p, q) => p - q);
      svg.querySelectorAll(".zoom").forEach((z) => z.remove());
      svg.append(node("rect", { class: "zoom", x: a, y: TOP, width: b - a, height: height - TOP - BOTTOM }));
    });
    plot.addEventListener("pointerdown", (e) => { if (e.pointerType === "mouse" && e.button === 0) began = place(e); });
    plot.addEventListener("pointerup", (e) => {
      const from = began;
      began = null;
      if (from === null || Math.abs(place(e) - from) < 6) return;
      const { s } = plot.scene;
      const [a, b] = [from, place(e)].map((p) => Math.min(s.to, Math.max(s.from, s.back(p)))).sort((p, q) => p - q);
      if (b > a) { state.zoom = [a, b]; drawAll(); }
    });
    plot.addEventListener("pointerleave", () => { began = null; hush(plot); });
    plot.addEventListener("dblclick", () => { state.zoom = null; drawAll(); });
    plot.addEventListener("blur", () => hush(plot));
    plot.addEventListener("keydown", (e) => {
      const by = { ArrowLeft: -8, ArrowRight: 8 }[e.key];
      if (e.key === "Escape") { state.zoom = null; drawAll(); }
      if (!by) return;
      e.preventDefault();
      tell(plot, Math.min(plot.scene.width - RIGHT, Math.max(LEFT, (plot.at === undefined ? LEFT : plot.at) + by)));
    });
  }

  // --- what can be chosen ----------------------------------------------------------------------------------------------

  function toggles() {
    for (const button of document.querySelectorAll("[data-toggle]")) {
      button.setAttribute("aria-pressed", String(!state.hidden.has(button.dataset.toggle)));
      button.onclick = () => {
        const key = button.dataset.toggle;
        if (!state.hidden.delete(key)) state.hidden.add(key);
        button.setAttribute("aria-pressed", String(!state.hidden.has(key)));
        drawAll();
      };
    }
  }

  function begin() {
    document.querySelectorAll(".plot").forEach(listen);
    toggles();
    drawAll();
  }

  byId("controls").hidden = false;
  for (const button of document.querySelectorAll("[data-axis]")) {
    button.onclick = () => {
      state.axis = button.dataset.axis;
      state.zoom = null; // it was on another axis
      document.querySelectorAll("[data-axis]").forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
      drawAll();
    };
    button.disabled = !AXES.includes(button.dataset.axis);
  }
  byId("smooth").oninput = (e) => {
    state.smooth = (Number(e.target.value) / 100) ** 2 / 4; // fine steps at the small end; up to a quarter of the run
    byId("smooth-said").textContent = state.smooth ? `half-life ${parseFloat((100 * state.smooth).toPrecision(2))} %` : "off";
    drawAll();
  };
  byId("log").onchange = (e) => { state.log = e.target.checked; drawAll(); };
  byId("outliers").onchange = (e) => { state.outliers = e.target.checked; drawAll(); };
  byId("zoom-out").onclick = () => { state.zoom = null; drawAll(); };
  let width = 0;
  new ResizeObserver(() => {
    if (document.documentElement.clientWidth !== width) { width = document.documentElement.clientWidth; drawAll(); }
  }).observe(document.documentElement);
  begin();

  // --- while it is trained ---------------------------------------------------------------------------------------------

  const live = byId("live");
  if (!live) return;
  const EVERY_MS = 2000;
  let tag = "";
  function lost(why) {
    live.className = "lost";
    live.textContent = why;
  }
  async function refresh() {
    const began = performance.now();
    try {
      const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag") || "";
        const fresh = await answer.json();
        const before = data.charts.map((c) => c.id).join();
        data = fresh.data;
        for (const [id, text] of Object.entries(fresh.sections)) {
          if (id === "charts" && before === data.charts.map((c) => c.id).join()) continue; // drawn again below
          const open = [...byId(id).querySelectorAll("details")].map((d) => d.open);
          byId(id).innerHTML = text;
          byId(id).querySelectorAll("details").forEach((d, i) => { d.open = open[i] || false; });
          if (id === "charts") begin();
        }
        drawAll();
      }
      if (answer.ok || answer.status === 304) { live.className = ""; live.textContent = "live"; }
      else lost((await answer.text()).trim() || `the answer was ${answer.status}`); // why there is nothing new now
    } catch {
      lost("regpt report --watch has ended: this is what it showed last");
    }
    setTimeout(refresh, Math.max(EVERY_MS, 10 * (performance.now() - began))); // a tenth of the time at most
  }
  setTimeout(refresh, EVERY_MS);
})();
