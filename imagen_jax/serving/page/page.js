"use strict";
// Strings from the server are shown as text, never as HTML.

const find = (id) => document.getElementById(id);
const make = (tag, values = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...children);
  return element;
};
const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));
const POLL = 400; // milliseconds
const followed = new Set(); // jobs that this page waits for
const SMALL = 256; // images up to this side are shown with sharp pixels

let about; // stages and limits, from /api/about
let size = 0; // side of the last stage's images, pixels

// Addresses are relative to the page's, so that the page works under any prefix.
async function call(path, options) {
  const response = await fetch(path, options);
  const body = await response.json();
  if (response.status === 401) find("access").hidden = false;
  if (!response.ok && !body.status) throw new Error(body.error);
  return body;
}

// An image cannot send a header, so the token is in a cookie of this path.
function giveToken(event) {
  event.preventDefault();
  const path = location.pathname.replace(/[^/]*$/, "");
  const secure = location.protocol === "https:" ? "; Secure" : "";
  document.cookie = `imagen_token=${find("token").value}; SameSite=Strict; path=${path}${secure}`;
  location.reload();
}

function showProblem(problem) {
  find("problem").textContent = problem;
  find("problem").hidden = !problem;
}

// "NAME@WEIGHT" of a LoRA -> [NAME, WEIGHT].
function splitLora(text) {
  const at = text.lastIndexOf("@");
  return [text.slice(0, at), Number(text.slice(at + 1))];
}

const loraInputs = (stage) =>
  find("stages").querySelectorAll(`[data-stage="${CSS.escape(stage)}"] .lora`);

function fill(settings) {
  find("prompt").value = settings.prompt ?? "";
  find("negative_prompt").value = settings.negative_prompt ?? "";
  find("samples").value = settings.samples ?? 1;
  find("seed").value = settings.seed ?? "";
  for (const stage of about.stages) {
    const values = settings.stages?.[stage.name] ?? stage;
    for (const name of ["steps", "guidance_weight"]) {
      find("stages").querySelector(`[data-stage="${CSS.escape(stage.name)}"] .${name}`).value =
        Math.min(values[name], about.limits[name]);
    }
    const weights = new Map((values.loras ?? []).map(splitLora));
    for (const input of loraInputs(stage.name)) input.value = weights.get(input.name) ?? 0;
  }
}

function showStages() {
  find("chain").textContent = about.stages
    .map((stage) => `${stage.name} ${stage.image_size} px`).join(" → ");
  size = about.stages[about.stages.length - 1].image_size;
  find("prompt").maxLength = find("negative_prompt").maxLength = about.limits.prompt;
  find("samples").max = about.limits.samples;
  find("loras").hidden = !about.stages.some((stage) => stage.loras.length);
  find("stages").replaceChildren(...about.stages.map((stage) => {
    const number = (name, label, values) => make("td", {}, make("input", {
      type: "number", className: name, required: true, ariaLabel: `${label} of ${stage.name}`,
      max: about.limits[name], ...values }));
    const row = make("tr", {}, make("td", { textContent: stage.name }),
      number("steps", "Steps", { min: 1, step: 1 }),
      number("guidance_weight", "Guidance", { min: 0, step: "any" }),
      make("td", { hidden: find("loras").hidden }, ...stage.loras.map((lora) => {
        const [name] = splitLora(lora);
        return make("label", { textContent: name }, make("input", { type: "number", name,
          className: "lora", required: true, step: "any",
          ariaLabel: `Weight of ${name} in ${stage.name}` }));
      })));
    row.dataset.stage = stage.name;
    return row;
  }));
}

function readForm() {
  const stages = {};
  for (const row of find("stages").children) {
    stages[row.dataset.stage] = {
      steps: Number(row.querySelector(".steps").value),
      guidance_weight: Number(row.querySelector(".guidance_weight").value),
    };
    const loras = [...loraInputs(row.dataset.stage)];
    if (loras.length) {
      stages[row.dataset.stage].loras = loras.map((input) => `${input.name}@${Number(input.value)}`);
    }
  }
  const settings = { prompt: find("prompt").value, samples: Number(find("samples").value), stages };
  if (find("negative_prompt").value.trim()) settings.negative_prompt = find("negative_prompt").value;
  if (find("seed").value !== "") settings.seed = Number(find("seed").value);
  return settings;
}

async function generate(event) {
  event.preventDefault();
  showProblem("");
  try {
    const job = await call("api/jobs", { method: "POST", body: JSON.stringify(readForm()),
      headers: { "content-type": "application/json" } });
    await follow(job);
  } catch (error) {
    showProblem(error.message);
  }
}

async function follow(job) {
  const image = make("img", { alt: "", hidden: true });
  const doing = make("p", { className: "doing" });
  const bar = make("progress", { max: 1, value: 0 });
  const box = make("div", { className: "job" }, image,
    make("p", { textContent: job.prompt }), bar, doing);
  const cancel = make("button", { type: "button", textContent: "Cancel" });
  cancel.addEventListener("click", () => drop(job.id));
  box.append(cancel);
  find("jobs").append(box);
  followed.add(job.id);
  try {
    for (; job.state === "waiting" || job.state === "sampling"; job = await call(`api/jobs/${job.id}`)) {
      bar.value = job.progress;
      doing.textContent = job.state === "waiting" ? `waiting, ${job.ahead} ahead` : job.doing;
      image.hidden = !job.preview;
      // The changing address makes the browser load the new estimate.
      if (job.preview) image.src = `api/jobs/${job.id}/preview.png?at=${job.progress}`;
      await pause(POLL);
    }
    if (job.state === "failed") throw new Error("Sampling failed; the server's log has the reason.");
  } finally {
    followed.delete(job.id);
    box.remove();
    await showImages();
  }
}

const drop = (id) => fetch(`api/jobs/${id}`, { method: "DELETE", keepalive: true });

function settingsOf(image) {
  const stages = Object.entries(image.stages)
    .map(([name, values]) => [`${name}: ${values.steps} steps`,
      `guidance ${values.guidance_weight}`, ...(values.loras ?? [])].join(", "));
  const negative = image.negative_prompt ? [`negative prompt: ${image.negative_prompt}`] : [];
  const number = image.samples > 1 ? ` · ${image.sample_index + 1} of ${image.samples}` : "";
  return [...negative, `seed ${image.seed}${number}`, ...stages].join("\n");
}

function card(image) {
  const address = `images/${image.id}.png`;
  const element = make("img", { src: address, alt: image.prompt, loading: "lazy",
    className: size <= SMALL ? "small" : "" });
  const reuse = make("button", { type: "button", textContent: "Use these settings" });
  reuse.addEventListener("click", () => {
    fill(image);
    showProblem("");
    window.scrollTo({ top: 0, behavior: "smooth" });
    find("prompt").focus();
  });
  const lines = settingsOf(image).split("\n").map((line) => make("div", { textContent: line }));
  return make("figure", {},
    make("a", { href: address, target: "_blank", rel: "noopener" }, element),
    make("figcaption", {}, make("p", { textContent: image.prompt }),
      make("div", { className: "settings" }, ...lines), reuse));
}

async function showImages() {
  const { images } = await call("api/images");
  find("gallery").replaceChildren(...images.map(card));
  find("empty").hidden = images.length > 0;
}

async function watch() {
  for (;;) {
    try {
      const { status, waiting } = await call("api/health");
      find("health").textContent = waiting ? `${status}, ${waiting} waiting` : status;
    } catch {
      find("health").textContent = "no response from the server";
    }
    await pause(5 * POLL);
  }
}

async function start() {
  find("access").addEventListener("submit", giveToken);
  window.addEventListener("pagehide", () => followed.forEach(drop));
  about = await call("api/about");
  showStages();
  fill({});
  find("ask").addEventListener("submit", generate);
  find("reset").addEventListener("click", () => { fill({}); showProblem(""); });
  await showImages();
  watch();
}

start().catch((error) => showProblem(error.message));
