// The page: loads the files, shows the pictures and the answers. Reading and the model are in the worker.
"use strict";

const $ = (id) => document.getElementById(id);
const pictures = []; // {file, name, button}, then its fault, or the worker's answer and the calibrated probabilities
let worker, arrived = 0, shown = null, label = 0, pan = { x: 0, y: 0 };

const make = (tag, textContent = "", attributes = {}) => Object.assign(document.createElement(tag), { textContent }, attributes);

// ---------------------------------------------------------------------------------------------- loading
const parts = {}; // of the file that is being loaded, as bytes

function receive(name, data) { // the scripts in local/ call it with Base64
  const bytes = typeof data !== "string" ? data : Uint8Array.fromBase64?.(data) ?? Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  (parts[name] ??= []).push(bytes);
  $("progress").value = (arrived += bytes.length) / Object.values(ABOUT.files).reduce((sum, { size }) => sum + size, 0);
}
// Bytes of a file of the folder. From a local disk a page may read scripts alone: those in local/ hold the same bytes.
async function load(name) {
  if (location.protocol === "file:") {
    for (let k = 0; k < ABOUT.files[name].chunks; k++) {
      await new Promise((onload, reject) => {
        const src = `local/${name}.${k}.js`, onerror = () => reject(new Error(`${src} is missing: copy the whole folder`));
        document.head.append(make("script", "", { src, onload, onerror }));
      });
    }
  } else {
    const response = await fetch(name), reader = response.body.getReader();
    if (!response.ok) throw new Error(`${name} is missing on the server (${response.status})`);
    for (let part; !(part = await reader.read()).done; ) receive(name, part.value);
  }
  return new Uint8Array(await new Blob(parts[name].splice(0)).arrayBuffer());
}

async function start() {
  const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
  if (!self.WebAssembly?.validate(new Uint8Array(simd))) throw new Error("this browser has no WebAssembly SIMD; use a newer one");
  const files = {};
  for (const name of Object.keys(ABOUT.files)) files[name] = await load(name);
  const script = new Blob(ABOUT.scripts.flatMap((name) => [files[name], "\n"]), { type: "text/javascript" });
  worker = new Worker(URL.createObjectURL(script));
  $("status").textContent = "Preparing the model ...";
  await ask({ files, about: ABOUT }, [files["model.onnx"].buffer]);
  $("status").textContent = "The model is ready.";
  $("loading").hidden = true;
}

function ask(message, transfer) {
  return new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => (data?.fault === undefined ? resolve(data) : reject(new Error(data.fault)));
    worker.onerror = (event) => reject(new Error(event.message || "the worker stopped"));
    worker.postMessage(message, transfer);
  });
}

// ---------------------------------------------------------------------------------------------- pictures
let queue = start().catch((error) => {
  Object.assign($("status"), { textContent: `The model cannot be used: ${error.message}`, className: "note" });
  $("files").disabled = $("loading").hidden = true;
});

function add(files) {
  for (const file of $("files").disabled ? [] : files) {
    const picture = { file, name: file.name, button: make("button", file.name, { onclick: () => show(picture) }) };
    picture.button.append(make("span", "waiting"));
    $("images").appendChild(make("li")).append(picture.button);
    pictures.push(picture);
    queue = queue.then(() => read(picture));
  }
  $("work").hidden = !pictures.length;
}

async function read(picture) {
  const line = picture.button.lastChild;
  line.textContent = "reading ...";
  try {
    const bytes = await picture.file.arrayBuffer();
    Object.assign(picture, await ask({ bytes: new Uint8Array(bytes) }, [bytes]));
    picture.calibrated = picture.probabilities.map(calibrate);
    const first = picture.calibrated.indexOf(Math.max(...picture.calibrated));
    line.textContent = `${ABOUT.labels[first]} ${picture.calibrated[first].toFixed(3)}`;
  } catch (error) {
    line.className = "fault";
    line.textContent = picture.fault = error.message;
  }
  const done = pictures.filter((one) => one.fault || one.gray).length, how = picture.fault ?? `${picture.seconds.toFixed(1)} s`;
  $("status").textContent = `${done} of ${pictures.length} images read. ${picture.name}: ${how}`;
  $("save").disabled = false;
  if (!shown || shown.fault || shown === picture) show(picture);
  else draw(); // the scale of the maps may have grown
}
// Temperature and Platt scaling are lines of the logit.
function calibrate(p, k) {
  const [slope, intercept] = ABOUT.evaluation?.[k].scaling ?? [1, 0], q = Math.min(1 - 1e-8, Math.max(1e-8, p));
  return slope === 1 && intercept === 0 ? p : 1 / (1 + Math.exp(-slope * Math.log(q / (1 - q)) - intercept));
}

function show(picture) {
  shown = picture;
  pictures.forEach((one) => one.button.setAttribute("aria-current", one === picture));
  const notes = picture.fault ? [`${picture.name}: ${picture.fault}`] : picture.notes ?? [];
  Object.assign($("notes"), { hidden: !notes.length, textContent: notes.join(" ") });
  const p = picture.calibrated ?? [], order = [...p.keys()].sort((a, b) => p[b] - p[a]);
  label = order[0] ?? label;
  $("answers").replaceChildren(...order.map((k) => row(ABOUT.labels[k], p[k], k, ABOUT.evaluation?.[k])));
  reset();
}

function row(name, p, k, found) {
  const line = make("tr"), head = make("th", "", { scope: "row" }), choice = make("label"), value = make("td", p.toFixed(3));
  choice.append(make("input", "", { type: "radio", name: "label", checked: k === label, onchange: () => draw((label = k)) }), ` ${name}`);
  head.append(choice);
  value.append(make("meter", "", { value: p, ariaLabel: `probability of ${name}` }));
  line.append(head, value);
  if (!found) return line;
  const { threshold, auroc } = found, above = threshold !== null && p >= threshold, [area, low, high] = auroc.map((v) => v?.toFixed(3));
  const cut = threshold === null ? "none" : `${threshold.toFixed(3)}, ${above ? "above" : "below"}`;
  const interval = area ? area + (low ? ` (${low}\u00a0to\u00a0${high})` : "") : "unknown";
  line.append(make("td", cut, { className: above ? "above" : "" }), make("td", interval));
  return line;
}

$("save").onclick = () => {
  const quote = (text) => `"${text.replaceAll('"', '""')}"`;
  const cells = (one) => [quote(one.name), quote(one.fault ?? ""), ...(one.calibrated ?? ABOUT.labels.map(() => ""))];
  const rows = [["path", "error", ...ABOUT.labels.map(quote)], ...pictures.filter((one) => one.fault || one.gray).map(cells)];
  const text = rows.map((row) => `${row.join(",")}\n`);
  make("a", "", { href: URL.createObjectURL(new Blob(text, { type: "text/csv" })), download: "predictions.csv" }).click();
};

// ---------------------------------------------------------------------------------------------- the view
const STOPS = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]]; // inferno
const setting = (id) => Number($(id).value); // of a slider
const pack = (r, g, b, opacity = 255) => (opacity << 24) | (b << 16) | (g << 8) | r; // as ImageData has a pixel

function asCanvas(width, height, pixels) {
  const canvas = make("canvas", "", { width, height }), bytes = new Uint8ClampedArray(Int32Array.from(pixels).buffer);
  canvas.getContext("2d").putImageData(new ImageData(bytes, width, height), 0, 0);
  return canvas;
}
// The map of one label, bilinear between its positions: number k of n is at first + k / n of the side.
function overlay({ data, width, height }, highest, side = 256) {
  const value = (x, y) => data[(label * height + Math.min(height - 1, y)) * width + Math.min(width - 1, x)];
  const strength = 2.55 * setting("strength"), position = (k, n) => Math.min(n - 1, Math.max(0, ((k + 0.5) / side - ABOUT.first) * n));
  return asCanvas(side, side, Array.from({ length: side * side }, (_, at) => {
    const x = position(at % side, width), y = position(Math.floor(at / side), height), i = Math.floor(x), j = Math.floor(y);
    const across = (row) => value(i, row) * (1 - x + i) + value(i + 1, row) * (x - i);
    const part = Math.min(1, Math.max(0, (across(j) * (1 - y + j) + across(j + 1) * (y - j)) / highest));
    const stop = Math.min(4, Math.floor(part * 5)), colour = STOPS[stop].map((c, k) => c + (part * 5 - stop) * (STOPS[stop + 1][k] - c));
    return pack(...colour, strength * Math.sqrt(part));
  }));
}
// Pixels of the picture -> of the canvas: [scale, left, top].
function place() {
  const { width, height } = $("view"), { gray } = shown;
  const scale = Math.min(width / gray.width, height / gray.height) * setting("zoom");
  return [scale, width / 2 + (pan.x - gray.width / 2) * scale, height / 2 + (pan.y - gray.height / 2) * scale];
}

function draw() {
  const view = $("view"), context = view.getContext("2d"), gray = shown?.gray;
  [view.width, view.height] = [view.clientWidth * devicePixelRatio, view.clientHeight * devicePixelRatio]; // clears it
  $("scale").hidden = !shown?.maps;
  view.ariaLabel = gray ? `${shown.name}${shown.maps ? `, with the map of ${ABOUT.labels[label]}` : ""}` : "No image";
  if (!gray) return;
  const [scale, left, top] = place(), area = [left, top, gray.width * scale, gray.height * scale], path = new Path2D();
  const levels = Uint8ClampedArray.from({ length: 256 }, (_, v) => 255 * ((v - setting("center")) / setting("width") + 0.5));
  const shades = Int32Array.from(levels, (v) => pack(v, v, v));
  context.drawImage(asCanvas(gray.width, gray.height, Int32Array.from(gray.data).map((v) => shades[v])), ...area);
  if (!shown.maps) return;
  const highest = pictures.reduce((most, one) => one.maps?.data.reduce((a, b) => Math.max(a, b), most) ?? most, 1e-9);
  $("highest").textContent = highest.toFixed(2);
  path.rect(...area);
  context.clip(path); // where the model saw black beside the picture, nothing is drawn
  const [x0, y0, x1, y1] = shown.seen;
  context.drawImage(overlay(shown.maps, highest), left + x0 * scale, top + y0 * scale, (x1 - x0) * scale, (y1 - y0) * scale);
}

function reset() {
  pan = { x: 0, y: 0 };
  ["zoom", "center", "width"].forEach((id) => ($(id).value = $(id).defaultValue));
  draw();
}

function move(x, y) { // by pixels of the screen
  const scale = shown?.gray ? place()[0] / devicePixelRatio : 1;
  draw((pan = { x: pan.x + x / scale, y: pan.y + y / scale }));
}
const change = (id, by) => draw(($(id).value = setting(id) + by));
Object.assign($("view"), {
  onpointerdown: (event) => $("view").setPointerCapture(event.pointerId),
  oncontextmenu: (event) => event.preventDefault(),
  onpointermove: ({ buttons, shiftKey, movementX, movementY }) => {
    if (buttons > 1 || (buttons && shiftKey)) move(movementX, movementY);
    else if (buttons) change("width", movementX, change("center", -movementY));
  },
  onwheel: (event) => event.preventDefault(change("zoom", -Math.sign(event.deltaY) * 0.1 * setting("zoom"))),
  onkeydown: (event) => {
    const step = { ArrowLeft: [30, 0], ArrowRight: [-30, 0], ArrowUp: [0, 30], ArrowDown: [0, -30] }[event.key];
    const act = step ? () => move(...step) : { "+": () => change("zoom", 0.5), "-": () => change("zoom", -0.5), 0: reset }[event.key];
    if (act) event.preventDefault(act());
  },
});
["strength", "zoom", "center", "width"].forEach((id) => ($(id).oninput = () => draw()));
$("reset").onclick = reset;
new ResizeObserver(() => draw()).observe($("view"));

// ---------------------------------------------------------------------------------------------- the start
$("files").onchange = () => add($("files").files);
ondragover = (event) => event.preventDefault();
ondrop = (event) => event.preventDefault(add(event.dataTransfer.files));
document.title = $("title").textContent = ABOUT.title;
$("about-answers").textContent = ABOUT.answers;
document.querySelectorAll(".evaluated").forEach((cell) => (cell.hidden = !ABOUT.evaluation));
$("strength").parentElement.hidden = ABOUT.first === null;
$("facts").append(...ABOUT.facts.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
$("limits").append(...ABOUT.limits.map((line) => make("li", line)));
