// The server's metrics in Prometheus' text format, and what is read from two looks at them.
import { call } from "./api.js";

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([^ ]+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

// By name: a list of [labels, value].
export async function look() {
  const text = await (await call("metrics")).text();
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (!match) continue;
    const [, name, labels = "", value] = match;
    if (!found.has(name)) found.set(name, []);
    found.get(name).push([Object.fromEntries([...labels.matchAll(LABEL)].map(([, key, text]) => [key, text])), Number(value)]);
  }
  return { at: Date.now() / 1000, found };
}

// The sum of a metric's samples whose labels are these.
export function sum(seen, name, labels = {}) {
  const fits = ([own]) => Object.entries(labels).every(([key, value]) => own[key] === value);
  return (seen.found.get(name) ?? []).filter(fits).reduce((total, [, value]) => total + value, 0);
}

export function by(seen, name, label) {
  const found = {};
  for (const [labels, value] of seen.found.get(name) ?? []) found[labels[label]] = (found[labels[label]] ?? 0) + value;
  return found;
}

// A counter's growth a second from one look to the next.
export function rate(before, now, name, labels) {
  const seconds = now.at - before.at;
  return seconds > 0 ? Math.max(0, sum(now, name, labels) - sum(before, name, labels)) / seconds : 0;
}

// A quantile of what a histogram counted between two looks, or null if it counted nothing. Within a bucket all values
// are taken to be spread evenly, as Prometheus' histogram_quantile does.
export function quantile(before, now, name, part) {
  const [old, fresh] = [by(before, `${name}_bucket`, "le"), by(now, `${name}_bucket`, "le")];
  const bounds = Object.keys(fresh).map((le) => [le === "+Inf" ? Infinity : Number(le), fresh[le] - (old[le] ?? 0)]);
  bounds.sort(([one], [other]) => one - other);
  const total = bounds.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  let [low, below] = [0, 0];
  for (const [high, count] of bounds) {
    if (count >= part * total) {
      if (high === Infinity) return low;
      return low + ((high - low) * (part * total - below)) / Math.max(1e-9, count - below);
    }
    [low, below] = [high, count];
  }
  return low;
}
