// Images: from base64 to a file and onto a canvas.

/** Return base64 as a PNG file. */
export function toFile(base64, name) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new File([bytes], name, { type: "image/png" });
}

/** Draw an image, a Blob, onto a canvas, which takes the image's size. */
export async function draw(canvas, blob) {
  const bitmap = await createImageBitmap(blob);
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
}

/** Draw an image as the service will convert it: turned upright, on white, its middle. */
export async function drawFitted(canvas, blob, width, height) {
  const bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const drawn = [bitmap.width * scale, bitmap.height * scale];
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.imageSmoothingEnabled = scale !== 1;
  context.drawImage(bitmap, (width - drawn[0]) / 2, (height - drawn[1]) / 2, ...drawn);
  bitmap.close();
}

/** Fill a canvas with noise: what a sample is before its first step. */
export function drawNoise(canvas, width, height, channels) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let place = 0; place < image.data.length; place += 4) {
    const grey = 256 * Math.random();
    for (let channel = 0; channel < 3; channel++) {
      image.data[place + channel] = channels === 1 ? grey : 256 * Math.random();
    }
    image.data[place + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}
