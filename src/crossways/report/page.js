"use strict";
// Draws every figure of the page from the JSON beside it, in the colours of the reader's scheme.
(() => {
  const dark = JSON.parse(document.getElementById("dark-colors").textContent);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const places = [...document.querySelectorAll("[data-figure]")];
  const hidden = new Set();
  const config = { displayModeBar: false, displaylogo: false, responsive: true };

  const read = (place, isDark) => {
    const text = document.getElementById(`figure-${place.dataset.figure}`).textContent;
    const colors = isDark ? text.replace(/#[0-9a-f]{6}/g, (color) => dark[color] ?? color) : text;
    return JSON.parse(colors);
  };

  const draw = async (place, isDark = scheme.matches) => {
    try {
      const { data, layout } = read(place, isDark);
      layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
      for (const trace of data) if (hidden.has(trace.legendgroup)) trace.visible = false;
      const checked = [...boxes(place)].filter((box) => box.checked).map((box) => box.value);
      if (checked.includes("whole")) delete layout.yaxis.range;
      for (const axis of ["xaxis", "yaxis"]) if (checked.includes(axis)) logarithmic(layout, axis);
      await Plotly.react(place, data, layout, config);
      return true;
    } catch (error) {
      place.textContent = `This plot could not be drawn: ${error.message}`;
      return false;
    }
  };

  const boxes = (place) =>
    document.querySelectorAll(`[data-controls="${place.dataset.figure}"] input[type=checkbox]`);

  const logarithmic = (layout, axis) => {
    const range = layout[axis].range;
    const short = range && range[1] < 5 * range[0];
    const steps = short ? [1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9] : [1, 2, 5];
    // Plotly's own ticks between powers of ten are bare digits: 20 would read 2.
    const tickvals = [...Array(16).keys()].flatMap((power) => steps.map((step) => step * 10 ** (power - 3)));
    Object.assign(layout[axis], { type: "log", tickvals, tickformat: "~s" });
    if (range) layout[axis].range = range.map(Math.log10);
  };

  const legend = (place, controls) => {
    for (const trace of read(place, false).data.filter((trace) => trace.showlegend)) {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      const key = document.createElement("span");
      const bar = trace.type === "bar";
      const color = (isDark) => (isDark ? dark[c] ?? c : c);
      const c = bar ? trace.marker.color : trace.line.color;
      key.className = bar ? "swatch" : "stroke";
      const paint = () => {
        if (bar) key.style.background = color(scheme.matches);
        else key.style.borderTop = `3px ${{ dash: "dashed", dot: "dotted" }[trace.line.dash] ?? "solid"} ${color(scheme.matches)}`;
      };
      paint();
      scheme.addEventListener("change", paint);
      const name = document.createElement("span");
      // The name was escaped for Plotly, which reads HTML entities; a text area decodes them and runs nothing.
      const decoder = document.createElement("textarea");
      decoder.innerHTML = trace.name;
      name.textContent = decoder.value;
      button.append(key, name);
      button.addEventListener("click", () => {
        const show = hidden.delete(trace.legendgroup);
        if (!show) hidden.add(trace.legendgroup);
        button.setAttribute("aria-pressed", String(show));
        draw(place);
      });
      controls.append(button);
    }
  };

  const toggle = (place, options, value, text) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    Object.assign(box, { type: "checkbox", value });
    box.addEventListener("change", () => draw(place));
    label.append(box, text);
    options.append(label);
  };

  for (const controls of document.querySelectorAll("[data-controls]")) {
    const place = document.querySelector(`[data-figure="${controls.dataset.controls}"]`);
    legend(place, controls);
    if (controls.dataset.controls === "curves") {
      const options = document.createElement("div");
      options.className = "options";
      controls.append(options);
      toggle(place, options, "yaxis", "logarithmic loss");
      toggle(place, options, "xaxis", "logarithmic tokens");
      toggle(place, options, "whole", "whole training");
    }
  }

  const all = (isDark) => Promise.all(places.map((place) => draw(place, isDark)));
  scheme.addEventListener("change", () => all());
  addEventListener("beforeprint", () => all(false));
  addEventListener("afterprint", () => all());
  all().then((drawn) => {
    document.documentElement.dataset.plotsDrawn = drawn.filter(Boolean).length;
    document.documentElement.dataset.plotsFailed = drawn.filter((ok) => !ok).length;
  });
})();
