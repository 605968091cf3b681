// A select with a search field, after the combobox pattern of the ARIA Authoring Practices Guide.

/** Turns a text input into a combobox. `value` is the chosen option's; "" is the empty option. */
export class Combobox {
  #input;
  #list;
  #options = [];
  #value = "";
  #active = -1;

  constructor(input) {
    this.#input = input;
    this.#list = Object.assign(document.createElement("ul"), {
      id: `${input.id}-list`,
      className: "options",
      hidden: true,
      role: "listbox",
      ariaLabel: input.labels[0].textContent,
    });
    input.after(this.#list);
    Object.assign(input, {
      role: "combobox",
      autocomplete: "off",
      spellcheck: false,
      ariaAutoComplete: "list",
      ariaExpanded: "false",
    });
    input.setAttribute("aria-controls", this.#list.id);
    input.addEventListener("click", () => this.#open(""));
    input.addEventListener("input", (event) => {
      // The form gets an event for a choice, not for typing.
      event.stopPropagation();
      this.#open(input.value);
    });
    input.addEventListener("keydown", (event) => this.#onKey(event));
    input.addEventListener("blur", () => this.#close());
    // Otherwise the field loses its focus before the click arrives.
    this.#list.addEventListener("pointerdown", (event) => event.preventDefault());
    this.#list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.#choose(option.dataset.value);
    });
  }

  /** Set the options: [value, text] of each. */
  set options(options) {
    this.#options = options;
    this.value = this.#value;
  }

  get value() {
    return this.#value;
  }

  /** Select an option; one that is not there selects the first. */
  set value(value) {
    const found = this.#options.find((option) => option[0] === value) ?? this.#options[0];
    this.#value = found?.[0] ?? "";
    this.#input.value = found?.[1] ?? "";
  }

  get #isOpen() {
    return !this.#list.hidden;
  }

  #open(search) {
    const words = search.toLowerCase().split(/\s+/);
    const found = this.#options.filter(([, text]) =>
      words.every((word) => text.toLowerCase().includes(word)),
    );
    this.#list.replaceChildren(...found.map((option, place) => this.#item(option, place)));
    this.#list.hidden = found.length === 0;
    this.#input.ariaExpanded = String(this.#isOpen);
    const chosen = found.findIndex(([value]) => value === this.#value);
    this.#activate(search ? 0 : chosen);
    if (!search) this.#input.select();
  }

  #item([value, text], place) {
    const item = Object.assign(document.createElement("li"), {
      id: `${this.#list.id}-${place}`,
      role: "option",
      textContent: text,
      ariaSelected: String(value === this.#value),
    });
    item.dataset.value = value;
    return item;
  }

  #activate(place) {
    const items = [...this.#list.children];
    this.#active = items.length ? Math.max(-1, Math.min(place, items.length - 1)) : -1;
    items.forEach((item, at) => item.classList.toggle("active", at === this.#active));
    const item = items[this.#active];
    item?.scrollIntoView({ block: "nearest" });
    if (item) this.#input.setAttribute("aria-activedescendant", item.id);
    else this.#input.removeAttribute("aria-activedescendant");
  }

  #onKey(event) {
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 };
    if (event.key in moves) {
      event.preventDefault();
      if (!this.#isOpen) this.#open("");
      else this.#activate(Math.max(0, this.#active + moves[event.key]));
    } else if (event.key === "Enter" && this.#isOpen) {
      event.preventDefault();
      const item = this.#list.children[this.#active];
      if (item) this.#choose(item.dataset.value);
    } else if (event.key === "Escape" && this.#isOpen) {
      event.preventDefault();
      this.#close();
    }
  }

  #choose(value) {
    this.#value = value;
    this.#close();
    this.#input.dispatchEvent(new Event("change", { bubbles: true }));
  }

  // What was typed and not chosen is dropped.
  #close() {
    this.#list.hidden = true;
    this.#input.ariaExpanded = "false";
    this.#input.removeAttribute("aria-activedescendant");
    this.value = this.#value;
  }
}
