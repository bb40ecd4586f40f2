// Numbers as people read them.
const UNITS = ["B", "kB", "MB", "GB", "TB"];

export function bytes(count) {
  let value = count, unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 99.5 ? Math.round(value) : value.toPrecision(value >= 9.95 ? 3 : 2)} ${UNITS[unit]}`;
}

export function count(value) {
  return Math.round(value).toLocaleString("en");
}

// "1:05", or "1:02:03" for long videos.
export function clock(seconds) {
  const whole = Math.floor(seconds + 1e-6);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

export function duration(seconds) {
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 10) return `${seconds.toFixed(2)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return span(seconds);
}

// A time to come or gone by, roughly: "3 h".
export function span(seconds) {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 1.5 * length || (unit === "min" && seconds >= 60)) return `${Math.round(seconds / length)} ${unit}`;
  }
  return `${Math.max(0, Math.round(seconds))} s`;
}

export function ago(at) {
  const seconds = Date.now() / 1000 - at;
  return seconds < 5 ? "just now" : `${span(seconds)} ago`;
}

// How many times as much, "2.5×".
export function ratio(larger, smaller) {
  const value = larger / smaller;
  if (!Number.isFinite(value)) return "";
  return `${value >= 99.5 ? count(value) : value.toPrecision(value >= 9.95 ? 2 : 2)}×`;
}
