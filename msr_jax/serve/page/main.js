// The page: uploads, progress, mixer, keys.

import * as api from "./api.js";
import { Picture } from "./picture.js";
import { Player } from "./player.js";

const $ = (id) => document.getElementById(id);
const REFINING = ["consistency", "diffusion"]; // in the order in which they are preferred

let offers = [];
let job = null; // that is shown
let unwatch = () => {};
let sending = new AbortController(); // ends what is being sent; the newest alone is wanted
let chosen = null; // the track that m mutes
let pictures = new Map();
const results = new Map(); // setting -> id of a job with the same song
let working = null; // id of the job that the server has last been asked for; none while it is being asked
const player = new Player((track, start, frames) => api.samples(job.id, track, start, frames));
player.onchange = showPlaying;
player.onlost = lost;
window.msrPlayer = player; // for those who look into the page, and its test

const offer = () => offers.find((o) => o.name === $("model").value);
const steps = () => Number(document.querySelector("#dial input:checked")?.value ?? 0);

function setting() {
  const refine = steps() ? REFINING.find((r) => offer().refinements.includes(r)) : "none";
  return { model: offer().name, refine, steps: steps() || null };
}

function say(text) {
  $("status").textContent = text;
}

function clock(samples) {
  const seconds = Math.floor(samples / (player.rate || 1));
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}

function showDial() {
  const before = steps();
  $("dial").querySelectorAll("label").forEach((label) => label.remove());
  for (const value of [0, ...offer().steps]) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "steps", value, checked: value === before });
    input.addEventListener("change", again);
    label.append(input, ` ${value || "none"}`);
    $("dial").append(label);
  }
  if (!document.querySelector("#dial input:checked")) $("dial").querySelector("input").checked = true;
}

async function start(fields) {
  const wanted = setting();
  sending.abort();
  working = null;
  const { signal } = (sending = new AbortController());
  $("work").hidden = false;
  $("progress").value = 0;
  try {
    const created = await api.createJob({ ...fields, ...wanted }, (share) => {
      say("Uploading …");
      $("progress").value = share;
    }, signal);
    if (signal.aborted) return api.removeJob(created.id); // the server was quicker
    working = created.id;
    results.set(JSON.stringify(wanted), working);
    show(created);
    follow(created.id);
  } catch (error) {
    if (signal.aborted) return;
    $("work").hidden = true;
    say(`That did not work: ${error.message}.`);
  }
}

function upload(file) {
  unwatch();
  for (const id of results.values()) api.removeJob(id);
  results.clear();
  job = null;
  player.forget();
  $("player").hidden = true;
  start({ file });
}

// The same song with the setting that is chosen now; one that was computed before is only shown.
function again() {
  if (!job) return;
  const known = results.get(JSON.stringify(setting()));
  unwatch();
  if (known) {
    sending.abort();
    working = known;
    follow(known);
  } else start({ source: job.id });
}

function follow(id) {
  unwatch = api.watch(id, show, () => say("The connection to the server is interrupted; trying again …"), lost);
}

function lost() {
  say("The connection to the server is lost, or it has forgotten the song.");
}

function show(now) {
  const fresh = job?.id !== now.id;
  if (fresh && now.state !== "done" && now.frames_done === 0) {
    progress(now); // what is heard stays until the new one has something to play
    if (job && now.state !== "failed") return;
  }
  const isNewSong = fresh && now.frames !== null;
  job = job && fresh && now.state === "failed" ? job : now;
  progress(now);
  if (now.state === "failed") for (const [name, id] of results) if (id === now.id) results.delete(name); // to be tried again
  if (now.frames === null || now.state === "failed") return;
  if (isNewSong || player.frames !== now.frames || player.jobId !== now.id) open(now);
  player.available = now.frames_done;
  refreshPictures(now);
  links();
}

function progress(now) {
  const words = {
    queued: now.ahead ? `Waiting: ${now.ahead} before it.` : "Waiting.",
    decoding: "Reading the file …",
    separating: "Separating …",
    done: "Separated.",
    failed: `That did not work: ${now.error}.`,
  };
  const share = now.frames ? now.frames_done / now.frames : 0;
  if ($("status").textContent !== words[now.state]) say(words[now.state]);
  $("progress").value = share;
  $("work").hidden = now.state === "done" || now.state === "failed";
}

function open(now) {
  player.jobId = now.id;
  player.open(["song", ...now.stems], now.sample_rate, now.frames);
  $("player").hidden = false;
  $("play").disabled = !player.context;
  $("unplayable").hidden = Boolean(player.context);
  $("song-title").textContent = now.name;
  $("position").max = now.frames / now.sample_rate;
  pictures = new Map();
  $("tracks").replaceChildren(...player.tracks.filter((t) => t.name !== "song").map(trackRow));
  showLoop();
  chosen = player.tracks[1];
  markChosen();
}

function trackRow(track, index) {
  const row = document.createElement("li");
  row.dataset.track = track.name;
  row.innerHTML = `<div class="controls"><h3></h3><button type="button" class="solo" aria-pressed="false">Solo</button>
    <button type="button" class="mute" aria-pressed="false">Mute</button>
    <label class="level">Level <input type="range" min="0" max="2" step="0.01" value="1"></label><a download>Download</a></div>
    <div class="picture"><canvas role="img"></canvas><div class="region" hidden></div><div class="needle"></div></div>`;
  const find = (selector) => row.querySelector(selector);
  find("h3").textContent = `${index + 1} ${track.name}`;
  find(".solo").setAttribute("aria-label", `Solo ${track.name}`);
  find(".mute").setAttribute("aria-label", `Mute ${track.name}`);
  find("canvas").setAttribute("aria-label", `Waveform and spectrogram of ${track.name}`);
  const level = find(".level input");
  level.setAttribute("aria-label", `Level of ${track.name}`);
  level.value = track.level;
  find(".solo").setAttribute("aria-pressed", track.solo);
  find(".mute").setAttribute("aria-pressed", track.mute);
  find(".solo").onclick = () => toggle(track, "solo");
  find(".mute").onclick = () => toggle(track, "mute");
  level.oninput = () => {
    track.level = Number(level.value);
    changed(track);
  };
  row.addEventListener("focusin", () => choose(track));
  pointer(find("canvas"));
  pictures.set(track.name, new Picture(find("canvas")));
  return row;
}

function toggle(track, what) {
  track[what] = !track[what];
  changed(track);
}

function changed(track) {
  choose(track);
  player.applyGains();
  for (const t of player.tracks) {
    const row = document.querySelector(`#tracks li[data-track="${CSS.escape(t.name)}"]`);
    row?.querySelector(".solo").setAttribute("aria-pressed", t.solo);
    row?.querySelector(".mute").setAttribute("aria-pressed", t.mute);
  }
  links();
}

function choose(track) {
  chosen = track;
  markChosen();
}

function markChosen() {
  for (const row of $("tracks").children) row.classList.toggle("chosen", row.dataset.track === chosen?.name);
}

// Click to seek, drag to loop.
function pointer(canvas) {
  const sample = (event) => {
    const box = canvas.getBoundingClientRect();
    return Math.max(0, Math.min(1, (event.clientX - box.left) / box.width)) * player.frames;
  };
  let from = null;
  canvas.addEventListener("pointerdown", (event) => {
    from = sample(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const to = sample(event);
    if (Math.abs(to - from) > player.frames * 0.01) setLoop(Math.min(from, to), Math.max(from, to));
    else player.seek(to);
    from = null;
  });
}

function setLoop(from, to) {
  player.setLoop(from === null ? null : { from, to });
  showLoop();
}

function showLoop() {
  $("loop").setAttribute("aria-pressed", player.loop !== null);
  for (const region of document.querySelectorAll(".region")) {
    region.hidden = player.loop === null;
    if (!player.loop) continue;
    region.style.left = `${(100 * player.loop.from) / player.frames}%`;
    region.style.right = `${100 - (100 * player.loop.to) / player.frames}%`;
  }
}

async function refreshPictures(now) {
  for (const [name, picture] of pictures) {
    const from = picture.count;
    const columns = await api.columns(now.id, name, from).catch(() => null);
    if (!columns || now.id !== player.jobId || pictures.get(name) !== picture) return;
    if (picture.count !== from) continue; // another call has been quicker
    picture.add(columns);
    picture.draw(Math.ceil(now.frames / columns.samples));
  }
}

function links() {
  const suffix = $("format").value;
  const ready = job?.state === "done";
  const gains = Object.fromEntries(player.tracks.filter((t) => t.name !== "song" && player.factor(t) > 0).map((t) => [t.name, player.factor(t)]));
  const set = (link, url) => {
    link.setAttribute("aria-disabled", !url);
    if (url) link.href = url;
    else link.removeAttribute("href");
  };
  set($("zip"), ready && api.zipUrl(job.id, suffix));
  set($("mix"), ready && Object.keys(gains).length && api.mixUrl(job.id, gains, suffix));
  for (const row of $("tracks").children) set(row.querySelector("a"), ready && api.fileUrl(job.id, row.dataset.track, suffix));
}

function showPlaying() {
  $("play").textContent = player.playing ? "Pause" : "Play";
}

function playOrPause() {
  if (player.playing) player.pause();
  else player.play();
}

function original() {
  player.original = !player.original;
  $("original").setAttribute("aria-pressed", player.original);
  player.applyGains();
  links();
}

function toggleLoop() {
  if (player.loop) setLoop(null);
  else setLoop(0, player.frames);
}

function tick() {
  if (player.frames) {
    const now = player.now();
    $("time").textContent = `${clock(now)} / ${clock(player.frames)}`;
    if (document.activeElement !== $("position")) $("position").value = now / player.rate;
    for (const needle of document.querySelectorAll(".needle")) needle.style.left = `${(100 * now) / player.frames}%`;
  }
  requestAnimationFrame(tick);
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("player").hidden) return;
  if (event.target.matches("select, input:not([type=range]), summary, a")) return;
  const stems = player.tracks.filter((t) => t.name !== "song");
  const actions = {
    " ": () => !event.target.matches("button") && (event.preventDefault(), playOrPause()),
    m: () => chosen && toggle(chosen, "mute"),
    a: original,
    l: toggleLoop,
    "[": () => setLoop(player.now(), player.loop?.to ?? player.frames),
    "]": () => setLoop(player.loop?.from ?? 0, player.now()),
    0: () => {
      for (const t of stems) t.solo = t.mute = false;
      changed(chosen);
    },
  };
  if (/^[1-9]$/.test(event.key)) stems[event.key - 1] && toggle(stems[event.key - 1], "solo");
  else actions[event.key]?.();
}

async function begin() {
  offers = await api.models();
  $("model").replaceChildren(...offers.map((o) => new Option(`${o.name} (${o.stems.join(", ")})`, o.name)));
  $("model-choice").hidden = offers.length < 2;
  showDial();
}

$("model").onchange = () => {
  showDial();
  again();
};
$("file").onchange = () => {
  const [file] = $("file").files;
  if (file) upload(file);
  $("file").value = ""; // so that the same one can be chosen again
};
$("format").onchange = links;
$("play").onclick = playOrPause;
$("original").onclick = original;
$("loop").onclick = toggleLoop;
$("loop-start").onclick = () => setLoop(player.now(), player.loop?.to ?? player.frames);
$("loop-end").onclick = () => setLoop(player.loop?.from ?? 0, player.now());
$("position").oninput = () => player.seek($("position").value * player.rate);
$("cancel").onclick = () => {
  unwatch();
  sending.abort();
  const id = working;
  working = null;
  for (const [name, value] of results) if (value === id) results.delete(name);
  if (id) api.removeJob(id);
  $("work").hidden = true;
  if (job?.id === id) {
    player.pause();
    job = null;
    $("player").hidden = true;
  }
  say("Cancelled.");
};
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
  });
}
document.addEventListener("keydown", key);
window.addEventListener("resize", () => job?.frames && refreshPictures(job));
begin().catch((error) => say(`That did not work: ${error.message}.`));
tick();
