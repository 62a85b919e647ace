// Draws a track: its waveform above, its spectrum below.

const WAVE_SHARE = 0.4; // of the height

export class Picture {
  constructor(canvas) {
    this.canvas = canvas;
    this.columns = new Uint8Array(0);
    this.width = 0; // bytes of a column
  }

  add({ bytes, bands }) {
    if (!bytes.length) return;
    this.width = 2 + bands;
    const joined = new Uint8Array(this.columns.length + bytes.length);
    joined.set(this.columns);
    joined.set(bytes, this.columns.length);
    this.columns = joined;
  }

  get count() {
    return this.width ? this.columns.length / this.width : 0;
  }

  // `total`: columns of the whole song, so that what is there already stands where it belongs.
  draw(total) {
    const { canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    const width = (canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio)));
    const height = (canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio)));
    const context = canvas.getContext("2d");
    const bands = this.width - 2;
    const split = Math.round(height * WAVE_SHARE);
    context.fillStyle = getComputedStyle(canvas).getPropertyValue("--wave");
    const signed = new Int8Array(this.columns.buffer);
    const image = context.createImageData(width, height - split);
    for (let x = 0; x < width; x++) {
      const first = Math.floor((x * total) / width);
      const last = Math.min(Math.max(first + 1, Math.floor(((x + 1) * total) / width)), this.count);
      if (first >= this.count) break;
      let low = 0;
      let high = 0;
      for (let c = first; c < last; c++) {
        low = Math.min(low, signed[c * this.width]);
        high = Math.max(high, signed[c * this.width + 1]);
      }
      const top = split / 2 - (high / 127) * (split / 2);
      context.fillRect(x, top, 1, Math.max(1, ((high - low) / 127) * (split / 2)));
      for (let y = 0; y < height - split; y++) {
        const band = Math.min(bands - 1, Math.floor(((height - split - 1 - y) * bands) / (height - split)));
        let level = 0;
        for (let c = first; c < last; c++) level = Math.max(level, this.columns[c * this.width + 2 + band]);
        image.data.set(colour(level), 4 * (y * width + x));
      }
    }
    context.putImageData(image, 0, split);
  }
}

// Levels 0 to 255 from nothing over blue and orange to a light yellow; readable on light and on dark.
function colour(level) {
  const t = Math.max(0, (level - 70) / 185);
  return [Math.min(255, 60 + 380 * t), Math.min(255, 40 + 300 * t * t), Math.min(255, 120 + 100 * t - 260 * t * t), Math.min(255, 520 * t)];
}
