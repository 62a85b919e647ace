// Plays all tracks of a job in step, to the sample, while they are still being made.
//
// Every track is cut into the same pieces, and pieces of one moment start at one time of the audio clock, so that tracks cannot
// drift apart. Times are counted in whole samples of that clock; what lies ahead is fetched and scheduled a few seconds before.

const BLOCK_SECONDS = 2;
const AHEAD_SECONDS = 4;
const KEPT_BLOCKS = 24; // of each track
const FADE_SECONDS = 0.01; // of a gain that changes, against clicks
const LOOK = 100; // milliseconds between two looks at what is to be fetched
const LONGEST_LOOK = 5000; // where the server does not answer

// A browser that does not play at `rate` has no context for it.
function contextOf(rate) {
  try {
    return new AudioContext({ sampleRate: rate });
  } catch {
    return null;
  }
}

export class Player {
  constructor(fetchSamples) {
    this.fetchSamples = fetchSamples; // (track, start, frames) => Promise of one Float32Array per channel
    this.tracks = []; // {name, gain node, level, mute, solo, blocks}
    this.playing = false;
    this.original = false;
    this.loop = null; // {from, to} in samples
    this.frames = this.available = 0;
    this.position = 0; // in samples, where playing begins next
    this.context = null; // none, either, where the browser does not play at the song's rate
    this.pieces = []; // that are scheduled
    this.onchange = () => {}; // it plays now, or does no more
    this.onlost = () => {}; // the server does not know the song any more
    this.generation = 0; // pieces that were asked for before a seek are not played after it
  }

  // A song and its stems; `frames` is the song's length in samples, `rate` in Hz.
  open(names, rate, frames) {
    const rateKept = this.context?.sampleRate === rate;
    const position = rateKept && this.frames === frames ? this.now() : 0;
    const levels = new Map(this.tracks.map((t) => [t.name, t]));
    const wasPlaying = this.playing;
    this.pause();
    if (!rateKept) {
      this.context?.close();
      this.context = contextOf(rate);
      this.output = this.context?.createGain();
      this.output?.connect(this.context.destination);
    }
    for (const track of this.tracks) track.gain?.disconnect();
    this.rate = rate;
    this.frames = frames;
    this.block = Math.round(BLOCK_SECONDS * rate);
    this.position = Math.min(position, frames);
    this.tracks = names.map((name) => {
      const gain = this.context?.createGain();
      gain?.connect(this.output);
      const old = levels.get(name);
      return { name, gain, level: old?.level ?? 1, mute: old?.mute ?? false, solo: old?.solo ?? false, blocks: new Map() };
    });
    if (this.loop && this.loop.to > frames) this.loop = null;
    this.applyGains(true);
    if (wasPlaying) this.play();
  }

  // Nothing of this song and its mixer is for the next one.
  forget() {
    this.pause();
    for (const track of this.tracks) track.gain?.disconnect();
    this.tracks = [];
    this.loop = null;
    this.frames = this.available = this.position = 0;
  }

  // What a track is multiplied with now, solo, mute and the original considered.
  factor(track) {
    if (track.name === "song") return this.original ? 1 : 0;
    if (this.original || track.mute) return 0;
    const anySolo = this.tracks.some((t) => t.solo);
    return anySolo && !track.solo ? 0 : track.level;
  }

  applyGains(atOnce = false) {
    if (!this.context) return;
    for (const track of this.tracks) {
      const value = this.factor(track);
      const now = this.context.currentTime;
      const parameter = track.gain.gain;
      parameter.cancelScheduledValues(now);
      if (atOnce) parameter.setValueAtTime(value, now);
      else {
        parameter.setValueAtTime(parameter.value, now);
        parameter.linearRampToValueAtTime(value, now + FADE_SECONDS);
      }
    }
  }

  async play() {
    if (this.playing || !this.frames || !this.context) return;
    if (this.position >= this.frames) this.position = 0;
    this.playing = true;
    this.onchange();
    await this.context.resume();
    if (this.playing) this.restart();
  }

  pause() {
    if (!this.playing) return;
    this.position = this.now();
    this.playing = false;
    this.silence();
    this.onchange();
  }

  seek(position) {
    const to = Math.max(0, Math.min(Math.round(position), this.frames));
    this.position = to;
    if (this.playing) this.restart();
  }

  setLoop(loop) {
    const position = this.now();
    this.loop = loop && loop.to - loop.from > this.rate / 20 ? { from: Math.round(loop.from), to: Math.round(loop.to) } : null;
    if (!this.loop) this.seek(position);
    else this.seek(position >= this.loop.from && position < this.loop.to ? position : this.loop.from);
  }

  // The sample that is heard now.
  now() {
    if (!this.playing) return this.position;
    const clock = this.context.currentTime * this.rate;
    let at = this.position;
    for (const piece of this.pieces) {
      if (clock < piece.at) break;
      at = piece.start + Math.min(clock - piece.at, piece.length);
    }
    return Math.floor(at);
  }

  silence() {
    this.generation++;
    clearTimeout(this.timer);
    for (const piece of this.pieces) for (const source of piece.sources) { source.stop(); source.disconnect(); }
    this.pieces = [];
  }

  restart() {
    this.silence();
    this.next = this.position; // the sample to schedule next
    this.clock = null; // and the sample of the audio clock at which it will sound
    this.wait = LOOK;
    this.fill(this.generation);
  }

  async fill(generation) {
    try {
      await this.schedule(generation);
      if (generation === this.generation) this.wait = LOOK;
    } catch (error) {
      if (generation !== this.generation) return;
      if (error.status === 404) {
        this.pause();
        this.onlost();
      }
      this.wait = Math.min(2 * this.wait, LONGEST_LOOK); // a piece that did not come now may come at a later look
    }
    if (this.playing && generation === this.generation) this.timer = setTimeout(() => this.fill(generation), this.wait);
  }

  async schedule(generation) {
    for (;;) {
      const clock = this.context.currentTime * this.rate;
      if (this.clock !== null && this.clock > clock + AHEAD_SECONDS * this.rate) break;
      if (this.loop && this.next >= this.loop.to) this.next = this.loop.from;
      if (this.next >= this.frames) {
        if (this.clock === null || clock >= this.clock) this.end();
        break;
      }
      const index = Math.floor(this.next / this.block);
      let end = Math.min((index + 1) * this.block, this.frames);
      if (Math.min(end, this.loop?.to ?? end) > this.available) break; // not separated yet
      const parts = await Promise.all(this.tracks.map((track) => this.fetchBlock(track, index, end)));
      if (generation !== this.generation || !this.playing) return;
      if (this.loop) end = Math.min(end, this.loop.to);
      this.place(parts, this.next - index * this.block, end - this.next);
    }
    this.prune();
  }

  fetchBlock(track, index, end) {
    let block = track.blocks.get(index);
    if (!block) {
      const start = index * this.block;
      block = this.fetchSamples(track.name, start, end - start);
      track.blocks.set(index, block);
      block.then((got) => got[0].length < end - start && track.blocks.delete(index), () => track.blocks.delete(index));
      if (track.blocks.size > KEPT_BLOCKS) track.blocks.delete(track.blocks.keys().next().value);
    }
    return block;
  }

  place(parts, offset, length) {
    const soonest = Math.ceil((this.context.currentTime + 0.05) * this.rate);
    const at = this.clock === null ? soonest : Math.max(this.clock, soonest); // late after waiting: all tracks alike
    const sources = parts.map((channels, k) => {
      const buffer = this.context.createBuffer(channels.length, length, this.rate);
      channels.forEach((samples, c) => buffer.copyToChannel(samples.subarray(offset, offset + length), c));
      const source = this.context.createBufferSource();
      source.buffer = buffer;
      source.connect(this.tracks[k].gain);
      source.start(at / this.rate);
      return source;
    });
    this.pieces.push({ at, start: this.next, length, sources });
    this.next += length;
    this.clock = at + length;
  }

  prune() {
    const clock = this.context.currentTime * this.rate;
    while (this.pieces.length > 1 && this.pieces[1].at < clock) this.pieces.shift();
  }

  end() {
    this.playing = false;
    this.position = this.frames;
    this.silence();
    this.onchange();
  }
}
