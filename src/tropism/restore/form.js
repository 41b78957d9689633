"use strict";
const form = JSON.parse(document.getElementById("form").textContent);
const $ = (id) => document.getElementById(id);
const letters = ["a", "b", "c"];
let rater = "", order = [], answers = {}, at = 0, kept = true, waiting = false;

// ---- the order: the same for a rater whenever the page is opened, another for every rater

function numbers(text) { // a small generator of numbers in [0, 1) from a text (FNV-1a, then mulberry32)
  let state = 2166136261;
  for (const unit of text) state = Math.imul(state ^ unit.codePointAt(0), 16777619);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function shuffled(count, text) {
  const next = numbers(text), places = [...Array(count).keys()];
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(next() * (i + 1));
    [places[i], places[j]] = [places[j], places[i]];
  }
  return places;
}

// ---- what is kept in this browser

const shelf = () => `tropism-form:${form.form}:${rater}`;

function remember() {
  try {
    localStorage.setItem(shelf(), JSON.stringify(answers));
    kept = true;
  } catch { kept = false; }
}

function recalled() {
  try {
    const found = JSON.parse(localStorage.getItem(shelf()) ?? "{}");
    const known = form.items.filter((item) => [1, 2, 3, 4, 5].includes(found[item.id]));
    return Object.fromEntries(known.map((item) => [item.id, found[item.id]]));
  } catch { return {}; }
}

// ---- the page

function begin(name) {
  rater = name;
  order = shuffled(form.items.length, `${form.form}:${rater}`);
  answers = recalled();
  at = Math.max(0, order.findIndex((i) => !(form.items[i].id in answers)));
  $("start").hidden = true;
  $("work").hidden = false;
  Object.keys(answers).length === order.length ? finish() : show();
}

function show() {
  const item = form.items[order[at]], chosen = answers[item.id];
  $("end").hidden = true;
  $("task").hidden = false;
  for (const letter of letters) {
    const image = $(letter);
    image.onload = () => image.classList.toggle("crisp", image.naturalWidth < image.clientWidth);
    image.src = item[letter];
    image.style.transform = "";
    image.parentElement.style.aspectRatio = `${item.width} / ${item.height}`;
    image.parentElement.style.maxWidth = `${(66 * item.width) / item.height}vh`; // the levels stay in sight below a tall picture
  }
  for (const button of document.querySelectorAll("button.level"))
    button.setAttribute("aria-pressed", String(Number(button.dataset.level) === chosen));
  $("back").disabled = at === 0;
  tell();
}

function tell() {
  const done = Object.keys(answers).length;
  $("progress").max = order.length;
  $("progress").value = done;
  $("where").textContent = `${rater}: picture ${at + 1} of ${order.length}, ${done} rated`;
  $("kept").textContent = kept ? "Kept in this browser as you go." : "This browser keeps nothing: save before you close the page.";
}

function rate(level) {
  if (waiting || $("work").hidden || $("task").hidden) return;
  answers[form.items[order[at]].id] = level;
  remember();
  show();
  $("saved").textContent = "";
  waiting = true; // long enough to see the choice, and to stop a key that is held down
  setTimeout(() => { waiting = false; onward(); }, 150);
}

function onward() {
  if (at + 1 < order.length && !(form.items[order[at + 1]].id in answers)) { at += 1; return show(); }
  const open = order.findIndex((i) => !(form.items[i].id in answers));
  if (open < 0) return finish();
  at = open;
  show();
}

function back() {
  if (waiting) return;
  if (!$("end").hidden) at = order.length;
  if (at > 0) { at -= 1; show(); }
}

function finish() {
  at = order.length - 1;
  $("task").hidden = true;
  $("end").hidden = false;
  tell();
}

function save() {
  const ratings = form.items.filter((item) => item.id in answers).map((item) => ({ item: item.id, level: answers[item.id] }));
  const file = { format: form.format, form: form.form, rater, higher_is_worse: true, ratings };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1)], { type: "application/json" }));
  link.download = `ratings-${rater}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  $("saved").textContent = `Saved ${ratings.length} ratings as ${link.download}, among your downloads. Send that file back.`;
}

function zoom(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const share = (place, from, size) => `${(100 * (place - from)) / size}%`;
  const on = !$("c").style.transform;
  for (const letter of letters) {
    $(letter).style.transformOrigin = `${share(event.clientX, box.left, box.width)} ${share(event.clientY, box.top, box.height)}`;
    $(letter).style.transform = on ? "scale(3)" : "";
  }
}

$("who").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("rater").value.trim();
  if (/^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$/.test(name)) begin(name);
  else $("wrong").textContent = "Letters, digits, - and _ only, at most 40.";
});
for (const button of document.querySelectorAll("button.level"))
  button.addEventListener("click", () => rate(Number(button.dataset.level)));
for (const button of document.querySelectorAll("button.save")) button.addEventListener("click", save);
for (const button of document.querySelectorAll("button.back")) button.addEventListener("click", back);
for (const frame of document.querySelectorAll(".frame")) frame.addEventListener("click", zoom);
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || $("work").hidden) return;
  if ("12345".includes(event.key)) rate(Number(event.key));
  if (event.key === "ArrowLeft" || event.key === "Backspace") { event.preventDefault(); back(); }
});
