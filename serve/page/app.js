// The page: a form, a stage where one run is shown, and a gallery of what was made.

import { call, follow, hasToken, onToken, toJson } from "./api.js";
import * as forms from "./form.js";
import { MaskEditor } from "./mask.js";
import { draw, drawFitted, drawNoise, toFile } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const GALLERY = "unnoise-gallery";
const MOST_ITEMS = 60;
const MOST_STORED = 2_000_000; // characters; browsers keep about 5 million for a site
const PREVIEW_PIXELS = 4e6; // of all previews of a run; more of them come after more steps each
const PIXEL_ART = 128; // smaller images are shown with sharp pixels
const NUMBERS = ["n", "steps", "guidance", "strength", "amount"];
// What the form does, and what it begins with. "create" is the first tab, the others are edits.
const VERBS = {
  create: { values: { n: "1", seed: "0" } },
  stylize: {
    about: "Noises the image and denoises it, under another label if you like.",
    values: { strength: "0.5", seed: "0" },
  },
  translate: {
    about: "Turns an image of one label into one of another.",
    values: { strength: "0.4" },
  },
  inpaint: { about: "Replaces what you paint over, and nothing else.", values: { seed: "0" } },
  interpolate: {
    about: "Goes from one image or seed to another.",
    values: { first: "1", last: "2", n: "8" },
  },
  variations: {
    about: "Makes images that are like this one.",
    values: { amount: "0.3", n: "8", seed: "0" },
  },
  invert: {
    about: "Takes the image to its noise and back, to see how exactly it returns.",
    values: { strength: "1" },
  },
};
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const form = $("form");

let limits = {};
let models = [];
let model = null; // an entry of `models`
let verb = "create";
let running = null; // the AbortController of the run under way
let selected = null; // the item whose numbers are shown
let items = []; // of the gallery, newest first
const kept = {}; // the values of the form by verb
const files = {}; // by slot
const mask = new MaskEditor($("mask"), showMask);

// --- Models

async function start() {
  const choices = Object.keys(VERBS).slice(1).map((value, place) => {
    const radio = make("input", { type: "radio", name: "verb", value, checked: place === 0 });
    return make("label", {}, radio, make("span", {}, value));
  });
  form.querySelector(".verbs").append(...choices);
  forms.prepare(form);
  onToken(askToken);
  listen();
  $("previews").checked = !calm.matches;
  try {
    ({ models, limits } = await info());
  } catch (error) {
    showError(error);
    return;
  }
  $("model").replaceChildren(...models.map(({ name }) => new Option(name, name)));
  $("model-field").hidden = models.length < 2;
  $("n").max = limits.samples;
  const { values } = forms.readHash();
  chooseModel(values.model);
  restoreHash();
  restoreGallery();
  document.body.dataset.ready = "";
}

// The service answers while its models are being opened.
async function info() {
  for (;;) {
    const found = await (await call("/v1/info")).json();
    if (found.opened) return found;
    say("The models are being opened…");
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}

function chooseModel(name) {
  model = models.find((entry) => entry.name === name) ?? models[0];
  $("model").value = model.name;
  const { width, height } = size();
  $("facts").textContent =
    (models.length > 1 ? "" : `${model.name} · `) +
    `${width}×${height} · ${model.backend} ${model.precision}`;
  // The page has no fields for them: the service then names what is missing, and this says where.
  const conditions = model.conditions.map(({ name }) => name);
  if (conditions.length) {
    $("facts").textContent += ` · needs ${conditions.join(", ")}: send them to /v1/samples`;
  }
  document.body.classList.toggle("pixels", Math.max(width, height) < PIXEL_ART);
  document.body.style.setProperty("--shape", `${width} / ${height}`);
  const labels = (model.labels ?? []).map((label) => [label, label]);
  for (const input of form.querySelectorAll("[data-combobox]")) {
    const free = !model.needs_label && input.dataset.combobox !== "needed";
    input.combobox.options = free ? [["", "Any"], ...labels] : labels;
  }
  for (const field of form.querySelectorAll("[data-labels]")) {
    field.classList.toggle("absent", !model.labels);
  }
  form.querySelector("[data-guides]").hidden = !model.can_guide;
  for (const name of Object.keys(kept)) delete kept[name];
  mask.resize(width, height);
  fill(verb);
  showIdle();
}

function size() {
  const [channels, height, width] = model.is_image ? model.sample_shape : [3, 32, 32];
  return { channels, height, width };
}

// --- The form

/** Show the fields of a verb, with its values or those that it had before. */
function chooseVerb(name, values) {
  kept[verb] = forms.read(form);
  fill(name, values);
}

function fill(name, values = {}) {
  verb = name;
  const edits = verb !== "create";
  for (const [tab, chosen] of [[$("tab-create"), !edits], [$("tab-edit"), edits]]) {
    tab.ariaSelected = String(chosen);
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen) $("panel").setAttribute("aria-labelledby", tab.id);
  }
  form.dataset.verb = verb;
  if (edits) form.querySelector(`[value="${verb}"]`).checked = true;
  for (const field of form.querySelectorAll("[data-verbs]")) {
    const verbs = field.dataset.verbs.split(" ");
    field.hidden = !verbs.includes(verb) && !(edits && verbs.includes("edit"));
  }
  $("about").textContent = VERBS[verb].about ?? "";
  $("own").textContent = edits ? "What is empty is set to what suits the edit." : "";
  $("submit").textContent = edits ? "Apply" : "Generate";
  const solvers = model.solvers.map((solver) => new Option(solver, solver));
  $("solver").replaceChildren(...(edits ? [new Option("What suits the edit", "")] : []), ...solvers);
  forms.fill(form, { ...begin(), ...kept[verb], ...values });
}

/** Show a verb with given values alone. */
function restore(name, values) {
  chooseVerb(name);
  delete kept[name];
  fill(name, values);
}

function begin() {
  const { solver, steps, guidance } = model.defaults;
  const { values } = VERBS[verb];
  if (verb === "create") return { ...values, solver, steps, guidance };
  // Two equal labels would translate nothing.
  return { ...values, source: model.labels?.[0], target: model.labels?.at(-1) };
}

function saveHash() {
  fitSteps();
  const many = models.length > 1 && { model: model.name };
  forms.writeHash(verb, { ...many, ...forms.read(form) });
}

function restoreHash() {
  const found = forms.readHash();
  if (!Object.hasOwn(VERBS, found.verb)) return;
  if ((found.values.model ?? model.name) !== model.name) chooseModel(found.values.model);
  restore(found.verb, found.values);
}

// A tuned solver exists for a few numbers of steps.
function fitSteps() {
  if ($("solver").value !== "tuned") return;
  const near = (steps) => Math.abs(steps - Number($("steps").value));
  const [nearest] = [...model.tuned_steps].sort((one, other) => near(one) - near(other));
  forms.fill(form, { ...forms.read(form), steps: nearest });
}

// --- Runs

async function submit() {
  if ($("fresh").checked && selected) forms.roll($("seed"));
  saveHash();
  const made = { verb, values: forms.read(form), files: { ...files }, model: model.name };
  const count = Math.min(Number(made.values.n) || 1, limits.samples);
  if (verb === "create") {
    const params = paramsOf(made.values, count);
    if (params.solver === model.defaults.solver) params.options = model.defaults.options;
    const request = {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: toJson(params),
    };
    await perform("/v1/samples", request, count, ({ images, urls }) =>
      images.map((image, place) => sampleItem(image, urls[place])),
    );
  } else {
    const request = { method: "POST", body: await editBody(made, count) };
    await perform(`/v1/edits/${verb}`, request, count, ({ images }) =>
      images.map((image, place) => ({ ...made, image, place })),
    );
  }
}

async function editBody(made, count) {
  const values = { ...made.values };
  const body = new FormData();
  for (const [slot, seed] of [["image", "first"], ["image2", "last"]]) {
    if (!files[slot] || (slot === "image2" && verb !== "interpolate")) continue;
    body.append(slot, files[slot]);
    delete values[seed];
  }
  if (verb === "inpaint") body.append("mask", await mask.toFile());
  body.append("params", toJson(paramsOf(values, count)));
  return body;
}

// What is no number goes to the service as it is, which says what is wrong.
function paramsOf(values, count) {
  const params = { model: model.name, ...values, stream: true };
  for (const name of NUMBERS) {
    if (name in params && Number.isFinite(Number(params[name]))) params[name] = Number(params[name]);
  }
  const steps = Number(values.steps) || model.defaults.steps;
  const { width, height } = size();
  const every = Math.ceil((steps * count * width * height) / PREVIEW_PIXELS);
  // Without previews the progress still moves, in quarters.
  params.every = Math.max(1, $("previews").checked ? every : Math.ceil(steps / 4));
  return params;
}

/** Run a request and show it. itemsOf: (data of `done`) → its items for the gallery. */
async function perform(path, request, count, itemsOf) {
  running?.abort();
  const control = new AbortController();
  running = control;
  const begun = performance.now();
  const canvases = showRunning(count);
  try {
    const response = await call(path, { ...request, signal: control.signal });
    const data = await follow(response, (name, event) => onEvent(canvases, name, event));
    const seconds = ((performance.now() - begun) / 1000).toFixed(1);
    const made = itemsOf(data);
    await showItems(made);
    remember(made);
    say(`${made.length === 1 ? "1 image" : `${made.length} images`} in ${seconds} s.`);
  } catch (error) {
    // A newer run has the stage.
    if (running !== control) return;
    showIdle();
    if (error.name === "AbortError") say("Cancelled.");
    else showError(error);
  } finally {
    if (running === control) showStopped();
  }
}

async function onEvent(canvases, name, event) {
  if (name === "status") {
    const seconds = Math.ceil(event.finish_seconds);
    say(seconds > 1 ? `Denoising, about ${seconds} s.` : "Denoising.");
  }
  if (name !== "preview" || !event.previews.length) return;
  if ($("previews").checked) {
    await Promise.all(
      event.previews.map(
        ({ sample, image }) => image && canvases[sample] && draw(canvases[sample], toFile(image)),
      ),
    );
  }
  // The service may finish one image before it begins the next.
  for (const { sample, step } of event.previews) if (canvases[sample]) canvases[sample].step = step;
  const done = canvases.reduce((sum, { step = 0 }) => sum + step, 0);
  const all = canvases.length * event.previews[0].steps;
  $("progress").value = done / all;
  $("step").textContent = `${done} / ${all}`;
}

// --- The stage

function say(text) {
  $("status").textContent = text;
}

function showError(error) {
  say("");
  $("error").hidden = false;
  $("error").textContent = error.message;
  forms.markNamed(form, error.message);
}

function hideError() {
  $("error").hidden = true;
  forms.markNamed(form, "");
}

function showIdle() {
  showNoise(1, "Noise");
  $("frames").classList.add("idle");
  if (model.is_image) say("Every image begins as noise.");
  else showError(new Error(`The samples of ${model.name} are no images. Use the API.`));
}

function showNoise(count, text) {
  selected = null;
  $("detail").hidden = true;
  const { channels, width, height } = size();
  const boxes = Array.from({ length: count }, () => frame(text, null));
  for (const { firstChild } of boxes) drawNoise(firstChild, width, height, channels);
  showFrames(boxes);
  return boxes.map((box) => box.firstChild);
}

function showFrames(boxes) {
  $("frames").className = ["one", "one", "two"][boxes.length] ?? "many";
  $("frames").replaceChildren(...boxes);
}

function showRunning(count) {
  hideError();
  const canvases = showNoise(count, "An image that is being made");
  $("cancel").hidden = false;
  $("progress").hidden = false;
  $("progress").value = 0;
  $("step").textContent = "";
  say("Waiting.");
  reveal();
  return canvases;
}

function showStopped() {
  running = null;
  // A hidden button would lose the focus to the top of the page.
  const held = document.activeElement === $("cancel");
  $("cancel").hidden = true;
  $("progress").hidden = true;
  $("step").textContent = "";
  if (held) $("submit").focus();
}

// On a phone the stage is below the form.
function reveal() {
  const { top, bottom } = $("frames").getBoundingClientRect();
  if (top >= 0 && bottom <= innerHeight) return;
  $("stage").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth", block: "start" });
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A canvas in a frame, which is a button if it is of an item. */
function frame(text, item) {
  const canvas = make("canvas", { role: "img", ariaLabel: text });
  if (!item) return make("div", { className: "frame" }, canvas);
  return make("button", { className: "frame", item, onclick: () => select(item) }, canvas);
}

async function showItems(made) {
  const boxes = made.map((item) => frame(titleOf(item), item));
  await Promise.all(boxes.map((box) => draw(box.firstChild, toFile(box.item.image))));
  const before = made[0].files?.image;
  if (before) {
    const box = frame("The image before the edit", null);
    box.classList.add("before");
    const { width, height } = size();
    await drawFitted(box.firstChild, before, width, height).catch(() => {});
    boxes.unshift(box);
  }
  showFrames(boxes);
  select(made[0]);
}

/** Show an item's numbers and what can be done with it. */
function select(item) {
  selected = item;
  for (const box of document.querySelectorAll("button.frame")) {
    box.ariaPressed = String(box.item === item);
  }
  const entries = Object.entries(item.values).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value)),
  );
  $("numbers").replaceChildren(...entries);
  $("copy").hidden = !item.url;
  // A link that is followed sends no token.
  $("open").hidden = !item.url || hasToken();
  $("open").href = item.url ?? "";
  $("download").href = urlOf(item);
  $("download").download = `${fileName(item)}.png`;
  $("promise").textContent = promiseOf(item);
  $("detail").hidden = false;
}

function urlOf({ image }) {
  return `data:image/png;base64,${image}`;
}

function promiseOf(item) {
  if (!item.url) return "An edit has no link: it needs the image that it began with.";
  return model.same_bytes ? "The link holds every number and gives the same bytes again." : "";
}

function titleOf({ verb: edit, place, values }) {
  const { label, seed, solver, steps } = values;
  const made = edit ? `${edit} ${place + 1}` : `seed ${seed}, ${solver} ${steps} steps`;
  return label ? `${label}, ${made}` : made;
}

function fileName({ model: name, verb: edit, place, values }) {
  const parts = edit ? [edit, place + 1] : [values.label, values.seed];
  return [name, ...parts].filter(Boolean).join("-").replace(/[^\w-]+/g, "-");
}

// --- The gallery

/** An item of a sample, whose URL holds all its numbers. */
function sampleItem(image, url) {
  const { searchParams } = new URL(url, location);
  const { model: name, ...values } = Object.fromEntries(searchParams);
  return { image, url, model: name, values };
}

function remember(made) {
  const urls = new Set(made.map(({ url }) => url).filter(Boolean));
  items = [...made, ...items.filter(({ url }) => !urls.has(url))].slice(0, MOST_ITEMS);
  showGallery();
  const stored = [];
  let held = 0;
  for (const { image, url } of items) {
    if (url) held += image.length;
    if (url && held < MOST_STORED) stored.push([image, url]);
  }
  sessionStorage.setItem(GALLERY, JSON.stringify(stored));
}

function restoreGallery() {
  const stored = JSON.parse(sessionStorage.getItem(GALLERY) ?? "[]");
  items = stored.map(([image, url]) => sampleItem(image, url));
  showGallery();
}

function showGallery() {
  $("shelf").hidden = items.length === 0;
  $("gallery").replaceChildren(
    ...items.map((item) => {
      const image = make("img", { src: urlOf(item), alt: titleOf(item) });
      const ariaPressed = String(item === selected);
      const onclick = () => recall(item);
      return make("li", {}, make("button", { className: "frame", item, ariaPressed, onclick }, image));
    }),
  );
}

/** Show an item again, with the form that made it. */
async function recall(item) {
  running?.abort();
  showStopped();
  hideError();
  if (item.model !== model.name) chooseModel(item.model);
  restore(item.verb ?? "create", { n: "1", ...item.values });
  const slots = item.verb ? ["image", "image2"] : [];
  await Promise.all(slots.map((slot) => setFile(slot, item.files[slot] ?? null)));
  saveHash();
  await showItems([item]);
  say("");
  reveal();
}

async function copyLink() {
  // The page asks for the token, which a link to the image cannot.
  const path = hasToken() ? `/#create?${new URLSearchParams({ model: model.name, ...selected.values })}` : selected.url;
  const link = new URL(path, location).href;
  try {
    await navigator.clipboard.writeText(link);
    say("Link copied.");
  } catch {
    // Browsers allow it on https and localhost alone.
    say(link);
  }
}

// --- Files and the mask

async function setFile(slot, file) {
  files[slot] = file;
  const box = form.querySelector(`[data-slot="${slot}"]`);
  const canvas = box.querySelector("canvas");
  const { width, height } = size();
  // The service says what is wrong with a file that cannot be drawn here.
  const shown = file && (await drawFitted(canvas, file, width, height).then(() => true, () => false));
  canvas.hidden = !shown;
  box.querySelector("label span").classList.toggle("unseen", Boolean(shown));
  box.querySelector(".link").hidden = !file;
  $(`${slot}-name`).textContent = file?.name ?? "";
  if (!file) $(slot).value = "";
  if (slot === "image") mask.picture = shown ? canvas : null;
}

function showMask({ size: diameter, erases, column, row, share }) {
  $("brush").textContent = `${diameter} px`;
  $("eraser").ariaPressed = String(erases);
  const tool = erases ? "eraser" : "brush";
  $("mask-state").textContent =
    `Column ${column + 1}, row ${row + 1}, ${tool} ${diameter}. ` +
    `${Math.round(100 * share)} % will be replaced.`;
}

function takeFrom(transfer, slot = "image") {
  const file = transfer?.files[0];
  if (!file) return;
  if (verb === "create") chooseVerb(form.elements.verb.value);
  saveHash();
  setFile(slot, file);
}

async function editSelected() {
  const { image, values } = selected;
  const name = `${fileName(selected)}.png`;
  const { label } = values;
  for (const edit of label ? Object.keys(VERBS).slice(1) : []) {
    kept[edit] = { ...kept[edit], label, source: label };
  }
  chooseVerb(form.elements.verb.value, label && { label, source: label });
  saveHash();
  await setFile("image", toFile(image, name));
  $("tab-edit").focus();
}

// --- Events

function listen() {
  const onClick = {
    "tab-create": () => chooseVerb("create"),
    "tab-edit": () => chooseVerb(form.elements.verb.value),
    dice: () => forms.roll($("seed")),
    cancel: () => running?.abort(),
    copy: copyLink,
    reuse: editSelected,
    empty: () => {
      items = [];
      remember([]);
      $("tab-create").focus();
    },
    smaller: () => mask.resizeBrush(-1),
    larger: () => mask.resizeBrush(1),
    eraser: () => mask.toggleEraser(),
    undo: () => mask.undo(),
    clear: () => mask.clear(),
  };
  for (const [id, act] of Object.entries(onClick)) $(id).addEventListener("click", act);
  for (const [tab, other] of [["create", "edit"], ["edit", "create"]]) {
    $(`tab-${tab}`).addEventListener("click", saveHash);
    $(`tab-${tab}`).addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      $(`tab-${other}`).click();
      $(`tab-${other}`).focus();
    });
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    model ? submit() : location.reload();
  });
  form.addEventListener("change", (event) => {
    if (event.target.name === "verb") chooseVerb(event.target.value);
    saveHash();
  });
  $("model").addEventListener("change", () => {
    chooseModel($("model").value);
    saveHash();
  });
  addEventListener("hashchange", restoreHash);
  listenToFiles();
}

function listenToFiles() {
  for (const box of form.querySelectorAll("[data-slot]")) {
    const { slot } = box.dataset;
    $(slot).addEventListener("change", () => takeFrom($(slot), slot));
    box.querySelector(".link").addEventListener("click", () => {
      setFile(slot, null);
      $(slot).focus();
    });
    for (const name of ["dragover", "dragleave", "drop"]) {
      box.addEventListener(name, () => box.classList.toggle("over", name === "dragover"));
    }
  }
  // An image that misses its slot must not replace the page.
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    takeFrom(event.dataTransfer, event.target.closest?.("[data-slot]")?.dataset.slot);
  });
  addEventListener("paste", (event) => takeFrom(event.clipboardData));
}

function askToken(sentence) {
  $("ask-why").textContent = sentence;
  $("token").value = "";
  $("ask").returnValue = "";
  $("ask").showModal();
  return new Promise((resolve) => {
    const end = () => resolve($("ask").returnValue && $("token").value.trim());
    $("ask").addEventListener("close", end, { once: true });
  });
}

start();
