// The mask of inpainting, drawn by pointer or keyboard, in pixels of the model.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const MOST_UNDO = 50;

/** Draws an image and the mask over it. */
export class MaskEditor {
  #canvas;
  #picture = document.createElement("canvas");
  #width = 0;
  #height = 0;
  #scale = 1; // pixels of the canvas for one of the model
  #painted = new Uint8Array(0); // 1 is to be replaced
  #before = []; // earlier masks, for undo
  #size = 5; // the brush's diameter
  #column = 0;
  #row = 0;
  #erases = false;
  #pressed = false; // the space bar, or the pointer
  #last = null; // where the pointer was
  #onChange;

  /** onChange: called with {size, erases, column, row, share} whenever any of these changes. */
  constructor(canvas, onChange) {
    this.#canvas = canvas;
    this.#onChange = onChange;
    canvas.addEventListener("keydown", (event) => this.#onKey(event));
    canvas.addEventListener("keyup", (event) => {
      if (event.key === " ") this.#pressed = false;
    });
    canvas.addEventListener("blur", () => {
      this.#pressed = false;
    });
    canvas.addEventListener("pointerdown", (event) => this.#onDown(event));
    canvas.addEventListener("pointermove", (event) => this.#onMove(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, () => {
        this.#pressed = false;
        this.#last = null;
      });
    }
  }

  /** Begin anew for images of width × height, which the model has. */
  resize(width, height) {
    this.#width = width;
    this.#height = height;
    this.#scale = Math.max(1, Math.floor(512 / Math.max(width, height)));
    this.#canvas.width = width * this.#scale;
    this.#canvas.height = height * this.#scale;
    this.#picture.width = 0;
    this.#size = Math.max(1, Math.round(width / 6));
    this.#column = width >> 1;
    this.#row = height >> 1;
    this.#painted = new Uint8Array(width * height);
    this.#before = [];
    this.#show();
  }

  /** Show an image, a canvas of the model's size, under the mask; null shows none. */
  set picture(canvas) {
    this.#picture.width = canvas ? this.#width : 0;
    this.#picture.height = this.#height;
    if (canvas) this.#picture.getContext("2d").drawImage(canvas, 0, 0);
    this.#show();
  }

  /** Return the mask as the service reads it: white is kept, black is replaced. */
  toFile() {
    const canvas = document.createElement("canvas");
    canvas.width = this.#width;
    canvas.height = this.#height;
    const context = canvas.getContext("2d");
    const image = context.createImageData(this.#width, this.#height);
    this.#painted.forEach((painted, place) => {
      image.data.fill(painted ? 0 : 255, 4 * place, 4 * place + 3);
      image.data[4 * place + 3] = 255;
    });
    context.putImageData(image, 0, 0);
    return new Promise((resolve) => {
      canvas.toBlob((blob) => resolve(new File([blob], "mask.png", { type: "image/png" })));
    });
  }

  resizeBrush(change) {
    this.#size = Math.max(1, Math.min(this.#width, this.#size + change));
    this.#show();
  }

  toggleEraser() {
    this.#erases = !this.#erases;
    this.#show();
  }

  undo() {
    this.#painted = this.#before.pop() ?? this.#painted;
    this.#show();
  }

  clear() {
    this.#remember();
    this.#painted.fill(0);
    this.#show();
  }

  #onKey(event) {
    const key = event.key.toLowerCase();
    if ((event.ctrlKey || event.metaKey || event.altKey) && key !== "z") return;
    const arrow = ARROWS[event.key];
    if (arrow) {
      // With Shift it moves by 4. All on the way is painted, as a pointer would.
      for (let count = event.shiftKey ? 4 : 1; count > 0; count--) this.#moveBy(...arrow);
    } else if (event.key === " ") {
      if (!event.repeat) this.#remember();
      this.#pressed = true;
      this.#stamp(this.#column, this.#row);
    } else if ("+=".includes(key)) this.resizeBrush(1);
    else if (key === "-") this.resizeBrush(-1);
    else if (key === "e") this.toggleEraser();
    else if (key === "z") this.undo();
    else return;
    event.preventDefault();
    this.#show();
  }

  #moveBy(right, down) {
    this.#column = Math.max(0, Math.min(this.#width - 1, this.#column + right));
    this.#row = Math.max(0, Math.min(this.#height - 1, this.#row + down));
    if (this.#pressed) this.#stamp(this.#column, this.#row);
  }

  #onDown(event) {
    if (event.button !== 0) return;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#remember();
    this.#pressed = true;
    this.#onMove(event);
  }

  #onMove(event) {
    const box = this.#canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.#width);
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.#height);
    if (this.#pressed) this.#line(this.#last ?? [column, row], [column, row]);
    this.#last = [column, row];
    this.#column = Math.max(0, Math.min(this.#width - 1, column));
    this.#row = Math.max(0, Math.min(this.#height - 1, row));
    this.#show();
  }

  // The pointer skips pixels when it is fast.
  #line(from, to) {
    const steps = Math.max(1, Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]));
    for (let step = 0; step <= steps; step++) {
      const part = step / steps;
      const column = Math.round(from[0] + (to[0] - from[0]) * part);
      this.#stamp(column, Math.round(from[1] + (to[1] - from[1]) * part));
    }
  }

  // A disc; of an even diameter its centre is the pixel's upper left corner.
  #stamp(column, row) {
    const centre = this.#size % 2 ? 0 : 0.5;
    const reach = Math.ceil(this.#size / 2);
    for (let y = row - reach; y <= row + reach; y++) {
      for (let x = column - reach; x <= column + reach; x++) {
        const distance = Math.hypot(x - column + centre, y - row + centre);
        const inside = x >= 0 && x < this.#width && y >= 0 && y < this.#height;
        if (!inside || distance > this.#size / 2) continue;
        this.#painted[y * this.#width + x] = this.#erases ? 0 : 1;
      }
    }
  }

  #remember() {
    this.#before.push(this.#painted.slice());
    if (this.#before.length > MOST_UNDO) this.#before.shift();
  }

  #show() {
    const context = this.#canvas.getContext("2d");
    const scale = this.#scale;
    const style = getComputedStyle(this.#canvas);
    context.fillStyle = style.getPropertyValue("--field");
    context.fillRect(0, 0, this.#canvas.width, this.#canvas.height);
    context.imageSmoothingEnabled = false;
    if (this.#picture.width) {
      context.drawImage(this.#picture, 0, 0, this.#canvas.width, this.#canvas.height);
    }
    context.fillStyle = style.getPropertyValue("--paint");
    this.#painted.forEach((painted, place) => {
      const x = (place % this.#width) * scale;
      const y = Math.floor(place / this.#width) * scale;
      if (painted) context.fillRect(x, y, scale, scale);
    });
    this.#outline(context);
    this.#onChange({
      size: this.#size,
      erases: this.#erases,
      column: this.#column,
      row: this.#row,
      share: this.#painted.reduce((sum, painted) => sum + painted, 0) / this.#painted.length,
    });
  }

  // White within black is seen on every image.
  #outline(context) {
    const scale = this.#scale;
    const offset = this.#size % 2 ? 0.5 : 0;
    for (const [width, colour] of [[5, "black"], [2, "white"]]) {
      context.beginPath();
      const x = (this.#column + offset) * scale;
      const y = (this.#row + offset) * scale;
      context.arc(x, y, Math.max(3, (this.#size / 2) * scale), 0, 2 * Math.PI);
      context.lineWidth = width;
      context.strokeStyle = colour;
      context.stroke();
    }
  }
}
