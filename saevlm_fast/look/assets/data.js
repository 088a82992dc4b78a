"use strict";
// The data of the page: every file of data/ calls SAEVLM.define. A file is loaded when it is first needed.
const SAEVLM = (() => {
  const values = new Map();
  const waiting = new Map();
  const recent = []; // names of chunks, the latest last: so many are kept
  const KEPT = 40;

  function define(name, value) {
    values.set(name, value);
    const told = waiting.get(name);
    if (told) {
      waiting.delete(name);
      told.forEach((resolve) => resolve(value));
    }
  }

  function fileOf(name) {
    const parts = name.split("/");
    if (parts[0] === "tiles") return `data/tiles-${parts[1].padStart(4, "0")}.js`;
    return `data/${parts[0]}/chunk-${parts[2].padStart(4, "0")}.js`;
  }

  function touch(name) {
    const at = recent.indexOf(name);
    if (at >= 0) recent.splice(at, 1);
    recent.push(name);
    if (recent.length > KEPT && !SAEVLM.single) values.delete(recent.shift());
  }

  function load(name) {
    touch(name);
    if (values.has(name)) return Promise.resolve(values.get(name));
    return new Promise((resolve, reject) => {
      const told = waiting.get(name);
      if (told) {
        told.push(resolve);
        return;
      }
      waiting.set(name, [resolve]);
      const script = document.createElement("script");
      script.src = fileOf(name);
      script.onload = () => script.remove();
      script.onerror = () => {
        waiting.delete(name);
        script.remove();
        reject(new Error(`${script.src} is missing`));
      };
      document.head.append(script);
    });
  }

  function bytes(text) {
    const raw = atob(text);
    const found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
    return found;
  }

  function floats(text) {
    const raw = bytes(text);
    const view = new DataView(raw.buffer);
    const found = new Float32Array(raw.length / 4);
    for (let i = 0; i < found.length; i++) found[i] = view.getFloat32(4 * i, true);
    return found;
  }

  return { define, load, bytes, floats, has: (name) => values.has(name), get: (name) => values.get(name), single: false };
})();

// Elements from text alone: nothing that a file is called or labelled is ever read as markup.
function el(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  return add(node, ...children);
}

// A name in a sentence: however it is written, what stands around it keeps its order (a percentage its digits).
const apart = (text) => `\u2068${text}\u2069`;

// Appends what is there: parts that have nothing to show are null.
function add(node, ...children) {
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

function svg(tag, props, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat());
  return node;
}

function digits(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e10) return value.toLocaleString("en");
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
}

// Of an activation: one that is whole has as many digits as those beside it.
const strength = (value) => (Number.isInteger(value) && value !== 0 && Math.abs(value) < 100 ? value.toPrecision(3) : digits(value));

// Of an axis: without zeros that say nothing.
const tick = (value) => (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5 ? digits(value) : String(Number(value.toPrecision(3))));

const percent = (share) => (share >= 0.0995 ? `${Math.round(100 * share)} %` : `${digits(100 * share)} %`);
