// The page: a form, the image that is being made, and a gallery. The address holds every number of
// an image, so it makes the same image again on any device.

const $ = (id) => document.getElementById(id);
const LAST_SEED = 2n ** 64n - 1n;
const SHARP = 128; // smaller images are shown with sharp pixels
const NULL = "none";
const FIELDS = ["label", "solver", "steps", "guidance", "seed"];
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const worker = new Worker("./worker.js", { type: "module" });
const loading = new Map();

let model = null;
let running = 0; // the number of the request under way
let asked = null; // what it asks for: the form may change meanwhile
let last = 0;

worker.onmessage = ({ data }) => on[data.kind](data);

const on = {
  loading({ name, received }) {
    loading.set(name, received);
    const done = [...loading.values()].reduce((sum, bytes) => sum + bytes, 0);
    $("status").textContent = `Loading … ${(done / 1e6).toFixed(1)} MB`;
  },
  opened({ model: opened, backend, threads }) {
    model = opened;
    fill();
    const how = backend === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
    $("status").textContent = `${model.precision} on ${how}`;
    $("make").disabled = false;
    document.body.dataset.ready = backend;
    if (location.hash) make();
  },
  step({ id, row, rows, pixels }) {
    if (id !== running) return;
    $("progress").value = row / rows;
    document.body.dataset.step = String(row);
    if (!calm.matches) draw(pixels);
  },
  done({ id, x, pixels, ms }) {
    if (id !== running) return;
    end();
    draw(pixels);
    const request = asked;
    $("facts").textContent = `${describe(request)}: ${(ms / 1000).toFixed(1)} s`;
    $("canvas").ariaLabel = describe(request);
    // For tests and for whoever wants the numbers.
    globalThis.unnoise = { x, request };
    document.body.dataset.done = String(id);
    show(request);
  },
  cancelled({ id }) {
    if (id === running) end("Cancelled");
  },
  failed({ message }) {
    end(message);
    if (!model) $("status").textContent = message;
  },
};

/** Fill the form with what the model has, and with the numbers of the address. */
function fill() {
  document.title = $("name").textContent = model.name;
  $("label-field").hidden = model.labels.length === 0;
  $("guidance-field").hidden = !model.can_guide;
  const labels = model.labels.map((name, number) => option(String(number), name));
  if (model.null_label !== null) labels.unshift(option(NULL, "no label"));
  $("label").replaceChildren(...labels);
  const solvers = [...new Set(model.programs.map((program) => program.solver))];
  $("solver").replaceChildren(...solvers.map((name) => option(name, name)));
  $("solver").value = solvers.includes(model.defaults.solver) ? model.defaults.solver : solvers[0];
  $("guidance").value = model.can_guide ? model.defaults.guidance : 1;
  $("seed").value = "0";
  fillSteps();
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of ["solver", ...FIELDS]) {
    if (given.has(name)) $(name).value = given.get(name);
    if (name === "solver") fillSteps();
    if ($(name).value === "") $(name).selectedIndex = 0;
  }
  const [, height, width] = model.shape;
  $("canvas").width = width;
  $("canvas").height = height;
  $("canvas").classList.toggle("sharp", width < SHARP);
}

function fillSteps() {
  const before = $("steps").value;
  const all = model.programs.filter((program) => program.solver === $("solver").value);
  const counts = all.map((program) => String(program.steps));
  $("steps").replaceChildren(...counts.map((count) => option(count, count)));
  $("steps").value = counts.includes(before) ? before : (counts.find((count) => count >= 10) ?? counts[0]);
}

function option(value, text) {
  return Object.assign(document.createElement("option"), { value, textContent: text });
}

/** The numbers of the form. */
function current() {
  return Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
}

function describe({ label, solver, steps, guidance, seed }) {
  const name = label === NULL || !model.labels.length ? "" : `${model.labels[label]}, `;
  const scale = name && model.can_guide ? `, guidance ${guidance}` : "";
  return `${name}seed ${seed}, ${solver}, ${steps} steps${scale}`;
}

function make() {
  const request = current();
  if (!$("form").reportValidity()) return;
  if (BigInt(request.seed) > LAST_SEED) {
    $("facts").textContent = `The seed must be at most ${LAST_SEED}.`;
    return;
  }
  stop();
  running = ++last;
  asked = request;
  $("cancel").disabled = false;
  $("progress").value = 0;
  $("facts").textContent = "";
  $("save").hidden = $("link").hidden = true;
  delete document.body.dataset.done;
  const hasLabel = model.labels.length > 0 && request.label !== NULL;
  worker.postMessage({
    kind: "sample",
    id: running,
    request: {
      seed: BigInt(request.seed),
      label: hasLabel ? Number(request.label) : null,
      solver: request.solver,
      steps: Number(request.steps),
      guidance: model.can_guide ? Number(request.guidance) : 1,
    },
  });
}

function stop() {
  if (running) worker.postMessage({ kind: "cancel", id: running });
}

function end(message = "") {
  running = 0;
  $("cancel").disabled = true;
  $("progress").value = message ? 0 : 1;
  $("facts").textContent = message;
}

function draw(pixels) {
  const [, height, width] = model.shape;
  $("canvas").getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
}

/** Offer the image for saving, and add it to the gallery. */
function show(request) {
  const address = `#${new URLSearchParams(request)}`;
  history.replaceState(null, "", address);
  $("link").href = address;
  $("canvas").toBlob((blob) => {
    const source = URL.createObjectURL(blob);
    Object.assign($("save"), { href: source, download: `${model.name}-${request.seed}.png` });
    $("save").hidden = $("link").hidden = false;
    const image = Object.assign(document.createElement("img"), { src: source, alt: describe(request) });
    image.classList.toggle("sharp", model.shape[2] < SHARP);
    const link = Object.assign(document.createElement("a"), { href: address });
    const item = document.createElement("li");
    link.append(image);
    item.append(link);
    $("gallery").prepend(item);
  });
}

function random() {
  const words = crypto.getRandomValues(new Uint32Array(1));
  $("seed").value = String(words[0]);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  make();
});
$("dice").addEventListener("click", random);
$("cancel").addEventListener("click", stop);
$("solver").addEventListener("change", fillSteps);
addEventListener("hashchange", () => {
  fill();
  make();
});
if ("serviceWorker" in navigator) navigator.serviceWorker.register("./sw.js").catch(() => {});
worker.postMessage({ kind: "open", backend: new URLSearchParams(location.search).get("backend") ?? "auto" });
