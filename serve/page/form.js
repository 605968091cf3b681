// The form: its values as plain objects of strings, and as the page's own URL.

import { Combobox } from "./combobox.js";

/** Make the comboboxes and sliders that the markup asks for. */
export function prepare(form) {
  for (const input of form.querySelectorAll("[data-combobox]")) {
    input.combobox = new Combobox(input);
  }
  for (const number of form.querySelectorAll("[data-slider]")) {
    const [min, max, step] = number.dataset.slider.split(" ");
    const slider = document.createElement("input");
    const row = document.createElement("div");
    const ariaLabel = `${number.labels[0].textContent}, slider`;
    Object.assign(slider, { type: "range", min, max, step, ariaLabel });
    row.className = "row";
    number.before(row);
    row.append(slider, number);
    number.slider = slider;
    slider.addEventListener("input", () => {
      number.value = slider.value;
    });
    number.addEventListener("input", () => {
      slider.value = number.value;
    });
  }
}

/** Write a random seed into an input. */
export function roll(input) {
  input.value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  input.dispatchEvent(new Event("change", { bubbles: true }));
}

/** Return the values of the controls that are shown and not empty, by name. */
export function read(form) {
  const values = {};
  for (const control of controlsOf(form)) {
    if (control.closest("[hidden]")) continue;
    const value = control.combobox ? control.combobox.value : control.value.trim();
    if (value !== "") values[control.name] = value;
  }
  return values;
}

/** Set the controls by name; those without a value become empty. */
export function fill(form, values) {
  for (const control of controlsOf(form)) {
    const value = values[control.name] ?? "";
    if (control.combobox) control.combobox.value = value;
    else control.value = value;
    if (control.slider) control.slider.value = value;
  }
}

/** Mark the controls that a sentence names in backticks, as the library's messages do. */
export function markNamed(form, sentence) {
  const names = new Set([...sentence.matchAll(/`(\w+)`/g)].map((match) => match[1]));
  for (const control of controlsOf(form)) {
    control.ariaInvalid = names.has(control.name) ? "true" : null;
  }
}

function controlsOf(form) {
  return [...form.elements].filter((control) => control.name && control.type !== "radio");
}

/** Write a verb and the values of its form into the page's URL. */
export function writeHash(verb, values) {
  history.replaceState(null, "", `#${verb}?${new URLSearchParams(values)}`);
}

/** Return the verb and values of the page's URL; "" and {} if it has none. */
export function readHash() {
  const [verb, query] = location.hash.slice(1).split("?");
  return { verb, values: Object.fromEntries(new URLSearchParams(query)) };
}
