// A line plot over time by uPlot, in the page's colours.
import uPlot from "./vendor/uplot.js";
import { html, useEffect, useRef } from "./html.js";
import { theme } from "./theme.js";
import { useStore } from "./store.js";

const HEIGHT = 168;
const SHORTEST = 120; // seconds that a plot shows at least
const time = (second) => new Date(1000 * second).toLocaleTimeString("en-GB");

function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

// `lines`: name and colour of each; `data`: times, then the values of each line; `write` makes text of a value.
export function Plot({ title, lines, data, write }) {
  const box = useRef(null);
  const plot = useRef(null);
  const { chosen } = useStore(theme);
  useEffect(() => {
    const element = box.current;
    const quiet = colour("quiet");
    const axis = { stroke: quiet, font: "11px Inter, system-ui, sans-serif", ticks: { show: false }, grid: { stroke: colour("line"), width: 1 } };
    const options = {
      width: element.clientWidth,
      height: HEIGHT,
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { size: 6 } },
      scales: {
        x: { range: (_, first, last) => [Math.min(first, last - SHORTEST), last] },
        y: { range: (_, low, high) => [0, high > 0 ? 1.1 * high : 1] },
      },
      axes: [{ ...axis, grid: { show: false }, size: 26, space: 90, values: (_, values) => values.map(time) }, { ...axis, size: 52, values: (_, values) => values.map(write) }],
      series: [{}, ...lines.map(({ name, tone }) => ({ label: name, stroke: colour(tone), width: 1.75, spanGaps: true, points: { show: false } }))],
    };
    const drawn = new uPlot(options, data, element);
    plot.current = drawn;
    const watch = new ResizeObserver(() => drawn.setSize({ width: element.clientWidth, height: HEIGHT }));
    watch.observe(element);
    return () => {
      watch.disconnect();
      drawn.destroy();
      plot.current = null;
    };
  }, [chosen]);
  useEffect(() => plot.current?.setData(data), [data]);
  const last = lines.map((_, place) => data[place + 1].findLast((value) => value !== null));
  return html`<figure class="plot">
    <figcaption>
      <h2>${title}</h2>
      ${lines.map(({ name, tone }, place) => html`<span class=${`line is-${tone}`}>${name} <b>${last[place] === undefined ? "–" : write(last[place])}</b></span>`)}
    </figcaption>
    <div ref=${box} role="img" aria-label=${`${title} over time`} />
  </figure>`;
}
