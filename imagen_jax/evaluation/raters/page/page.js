"use strict";
// One rater, one browser: the study stands in the page, the answers in localStorage.

const study = JSON.parse(document.getElementById("study").dataset.study);
const find = (id) => document.getElementById(id);
const make = (tag, values = {}) => Object.assign(document.createElement(tag), values);

let rater = "";
let category = "";
let order = []; // numbers of the items, as this rater sees them
let at = 0; // where in `order`
let given = {}; // "item/question" -> {item, question, answer, seconds}
let shownAt = 0;

const store = () => `imagen-ratings/${study.id}/${rater}`;

function warn(text) {
  find("warning").textContent = text;
  find("warning").hidden = false;
}

function keep() {
  try {
    localStorage.setItem(store(), JSON.stringify(given));
  } catch {
    warn("This browser does not keep answers: save the results before you close the page.");
  }
}

function recall() {
  try {
    given = JSON.parse(localStorage.getItem(store())) ?? {};
  } catch {
    given = {};
  }
}

// Each rater has an order of their own, always the same one: small shuffled numbers from the name.
function shuffled(numbers, text) {
  let seed = 2166136261;
  for (const letter of text) seed = Math.imul(seed ^ letter.codePointAt(0), 16777619);
  const random = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let bits = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    bits = (bits + Math.imul(bits ^ (bits >>> 7), 61 | bits)) ^ bits;
    return ((bits ^ (bits >>> 14)) >>> 0) / 4294967296;
  };
  for (let i = numbers.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [numbers[i], numbers[j]] = [numbers[j], numbers[i]];
  }
  return numbers;
}

const answerTo = (item, question) => given[`${item}/${question.name}`]?.answer;
const open = (item) => study.questions.find((question) => !answerTo(item, question));

function begin(event) {
  event.preventDefault();
  rater = find("rater").value.trim();
  if (!rater) return;
  category = find("category").value;
  recall();
  const all = study.items.map((_, i) => i);
  const wanted = all.filter((i) => !category || study.items[i].category === category);
  order = shuffled(wanted, study.id + rater);
  const first = order.findIndex(open);
  at = first < 0 ? order.length : first;
  show();
}

function show() {
  const done = at >= order.length;
  find("start").hidden = true;
  find("rating").hidden = done;
  find("end").hidden = !done;
  if (done) return;
  const item = study.items[order[at]];
  find("bar").max = order.length;
  find("bar").value = at;
  find("count").textContent = `${at + 1} of ${order.length}`;
  find("caption").textContent = item.caption;
  find("sides").replaceChildren(...item.pictures.map((names, side) => {
    const box = make("section", { className: "side" });
    if (item.pictures.length > 1) box.append(make("h2", { textContent: ["Left", "Right"][side] }));
    const pictures = make("div", { className: `pictures ${names.length > 1 ? "many" : "one"}` });
    pictures.append(...names.map((name) => make("img", { src: `pictures/${name}`, alt: "" })));
    box.append(pictures);
    return box;
  }));
  showQuestions();
  fetchNext();
  shownAt = performance.now();
}

function fetchNext() {
  const next = study.items[order[at + 1]];
  for (const name of next?.pictures.flat() ?? []) new Image().src = `pictures/${name}`;
}

function showQuestions() {
  const item = order[at];
  const current = open(item) ?? study.questions[0];
  find("questions").replaceChildren(...study.questions.map((question) => {
    const box = make("section", { className: "question" });
    box.classList.toggle("current", question === current);
    box.append(make("p", { textContent: question.text }));
    const row = make("div", { className: "answers" });
    question.answers.forEach(([value, words], index) => {
      const button = make("button", { type: "button" });
      button.append(make("kbd", { textContent: index + 1 }), ` ${words}`);
      button.setAttribute("aria-pressed", answerTo(item, question) === value);
      button.addEventListener("click", () => answer(question, value));
      row.append(button);
    });
    box.append(row);
    return box;
  }));
}

function answer(question, value) {
  const item = order[at];
  const seconds = Math.round((performance.now() - shownAt) / 100) / 10;
  given[`${item}/${question.name}`] = { item, question: question.name, answer: value, seconds };
  keep();
  if (open(item)) return showQuestions();
  at += 1;
  show();
}

// Going back takes back this item's answers or, where there are none, those of the item before, so
// that the keys mean what they meant.
function back() {
  const begun = at < order.length && study.questions.some((question) => answerTo(order[at], question));
  if (!begun && at === 0) return;
  if (!begun) at -= 1;
  for (const question of study.questions) delete given[`${order[at]}/${question.name}`];
  keep();
  show();
}

function save() {
  const result = { study: study.id, rater, saved: new Date().toISOString(),
    answers: Object.values(given) };
  const url = URL.createObjectURL(
    new Blob([JSON.stringify(result, null, 1)], { type: "application/json" }));
  const name = rater.replace(/[^\p{L}\p{N}_-]+/gu, "_");
  make("a", { href: url, download: `ratings_${name}_${study.id}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function press(event) {
  if (!find("start").hidden || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.key === "Backspace") {
    event.preventDefault();
    return back();
  }
  if (at >= order.length) return;
  const question = open(order[at]);
  const chosen = question?.answers[Number(event.key) - 1];
  if (chosen) answer(question, chosen[0]);
}

const categories = [...new Set(study.items.map((item) => item.category))].filter(Boolean).sort();
find("choice").hidden = categories.length === 0;
find("category").append(make("option", { value: "", textContent: "everything" }),
  ...categories.map((name) => make("option", { value: name, textContent: name })));
find("intro").textContent = study.questions.map((question) => question.text).join(" ");
find("begin").addEventListener("submit", begin);
find("save").addEventListener("click", save);
find("save_all").addEventListener("click", save);
find("back").addEventListener("click", back);
document.addEventListener("keydown", press);
