"use strict";
// All words that come from the server are shown as text, never as HTML.

const find = (id) => document.getElementById(id);
const make = (tag, values = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...children);
  return element;
};
const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));
const POLL = 400;
const SMALL = 256; // pictures up to this side are shown with their pixels

let about;
let size = 0; // side of the last stage's pictures

async function call(path, options) {
  const answer = await fetch(path, options);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

function say(problem) {
  find("problem").textContent = problem;
  find("problem").hidden = !problem;
}

function fill(settings) {
  find("prompt").value = settings.prompt ?? "";
  find("negative_prompt").value = settings.negative_prompt ?? "";
  find("samples").value = settings.samples ?? 1;
  find("seed").value = settings.seed ?? "";
  for (const stage of about.stages) {
    const given = settings.stages?.[stage.name] ?? stage;
    for (const name of ["steps", "guidance_weight"]) {
      find("stages").querySelector(`[data-stage="${CSS.escape(stage.name)}"] .${name}`).value =
        Math.min(given[name], about.limits[name]);
    }
  }
}

function showStages() {
  find("chain").textContent = about.stages
    .map((stage) => `${stage.name} ${stage.image_size} px`).join(" → ");
  size = about.stages[about.stages.length - 1].image_size;
  find("prompt").maxLength = find("negative_prompt").maxLength = about.limits.prompt;
  find("samples").max = about.limits.samples;
  find("stages").replaceChildren(...about.stages.map((stage) => {
    const number = (name, label, values) => make("td", {}, make("input", {
      type: "number", className: name, required: true, ariaLabel: `${label} of ${stage.name}`,
      max: about.limits[name], ...values }));
    const row = make("tr", {}, make("td", { textContent: stage.name }),
      number("steps", "Steps", { min: 1, step: 1 }),
      number("guidance_weight", "Guidance", { min: 0, step: "any" }));
    row.dataset.stage = stage.name;
    return row;
  }));
}

function asked() {
  const stages = {};
  for (const row of find("stages").children) {
    stages[row.dataset.stage] = {
      steps: Number(row.querySelector(".steps").value),
      guidance_weight: Number(row.querySelector(".guidance_weight").value),
    };
  }
  const settings = { prompt: find("prompt").value, samples: Number(find("samples").value), stages };
  if (find("negative_prompt").value.trim()) settings.negative_prompt = find("negative_prompt").value;
  if (find("seed").value !== "") settings.seed = Number(find("seed").value);
  return settings;
}

async function draw(event) {
  event.preventDefault();
  say("");
  try {
    const job = await call("/api/jobs", { method: "POST", body: JSON.stringify(asked()),
      headers: { "content-type": "application/json" } });
    await follow(job);
  } catch (error) {
    say(error.message);
  }
}

async function follow(job) {
  const image = make("img", { alt: "", hidden: true });
  const doing = make("p", { className: "doing" });
  const bar = make("progress", { max: 1, value: 0 });
  const box = make("div", { className: "job" }, image,
    make("p", { textContent: job.prompt }), bar, doing);
  find("jobs").append(box);
  try {
    for (; job.state === "waiting" || job.state === "drawing"; job = await call(`/api/jobs/${job.id}`)) {
      bar.value = job.progress;
      doing.textContent = job.state === "waiting" ? `waiting, ${job.ahead} before it` : job.doing;
      image.hidden = !job.preview;
      // A changed address, or the browser shows the estimate it has.
      if (job.preview) image.src = `/api/jobs/${job.id}/preview.png?at=${job.progress}`;
      await pause(POLL);
    }
    if (job.state === "failed") throw new Error("This could not be drawn; the server's log says why.");
  } finally {
    box.remove();
    await showPictures();
  }
}

function settingsOf(picture) {
  const stages = Object.entries(picture.stages)
    .map(([name, given]) => `${name}: ${given.steps} steps, guidance ${given.guidance_weight}`);
  const not = picture.negative_prompt ? [`not: ${picture.negative_prompt}`] : [];
  const number = picture.samples > 1 ? ` · ${picture.sample_index + 1} of ${picture.samples}` : "";
  return [...not, `seed ${picture.seed}${number}`, ...stages].join("\n");
}

function card(picture) {
  const address = `/pictures/${picture.id}.png`;
  const image = make("img", { src: address, alt: picture.prompt, loading: "lazy",
    className: size <= SMALL ? "small" : "" });
  const again = make("button", { type: "button", textContent: "Again with these settings" });
  again.addEventListener("click", () => {
    fill(picture);
    say("");
    window.scrollTo({ top: 0, behavior: "smooth" });
    find("prompt").focus();
  });
  const lines = settingsOf(picture).split("\n").map((line) => make("div", { textContent: line }));
  return make("figure", {},
    make("a", { href: address, target: "_blank", rel: "noopener" }, image),
    make("figcaption", {}, make("p", { textContent: picture.prompt }),
      make("div", { className: "settings" }, ...lines), again));
}

async function showPictures() {
  const { pictures } = await call("/api/pictures");
  find("gallery").replaceChildren(...pictures.map(card));
  find("empty").hidden = pictures.length > 0;
}

async function watch() {
  for (;;) {
    try {
      const { status, waiting } = await call("/api/health");
      find("health").textContent = waiting ? `${status}, ${waiting} waiting` : status;
    } catch {
      find("health").textContent = "the server does not answer";
    }
    await pause(5 * POLL);
  }
}

async function start() {
  about = await call("/api/about");
  showStages();
  fill({});
  find("ask").addEventListener("submit", draw);
  find("reset").addEventListener("click", () => { fill({}); say(""); });
  await showPictures();
  watch();
}

start().catch((error) => say(error.message));
