// The conversation of the page. Gradio evaluates this file as the body of a function with `element`, `props`, `trigger`
// and `watch`. Words of questions and answers only ever become text nodes: HTML in them is shown, never executed.
const log = element.querySelector(".log"), alertBox = element.querySelector(".alert");
const welcome = element.querySelector(".welcome"), nodes = [];
const make = (tag, cls, text) => {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  if (text !== undefined) node.textContent = text;
  return node;
};
const button = (text, label, act, cls = "") => {
  const node = make("button", `quiet ${cls}`, text);
  node.type = "button";
  if (label !== text) node.setAttribute("aria-label", label);
  node.addEventListener("click", act);
  return node;
};
const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };

function create(index) {
  const root = make("article", "exchange"), pictures = make("div", "pictures"), words = make("div", "words");
  root.setAttribute("aria-label", `Question ${index + 1} and its answer`);
  const asked = make("div", "asked"), question = make("p", "question"), answer = make("div", "answer");
  const note = make("p", "note"), actions = make("div", "actions"), tools = make("div", "tools");
  const edit = button("Edit", "Edit this question", () => editing(index, asked));
  tools.append(edit);
  asked.append(make("span", "who", "You"), question, tools);
  const again = button("Regenerate", "Generate this answer again", () => trigger("regenerate", { index }));
  const copy = button("Copy", "Copy this answer", async () => {
    const text = props.value.exchanges[index].answer || "";
    try { await navigator.clipboard.writeText(text); put(copy, "Copied"); } catch { put(copy, "Not copied"); }
    setTimeout(() => put(copy, "Copy"), 1500);
  });
  const rate = (name, text) => button(text, `${text}: rate this answer`, () => trigger("rate",
    { index, rating: props.value.exchanges[index].rating === name ? "" : name }));
  const like = rate("like", "Like"), dislike = rate("dislike", "Dislike");
  actions.append(copy, again);
  if (props.rated) actions.append(like, dislike);
  words.append(asked, make("span", "who", props.model), answer, note, actions);
  root.append(pictures, words);
  return { root, pictures, asked, question, answer, note, actions, tools, again, like, dislike, urls: "" };
}

function editing(index, asked) {
  if (asked.querySelector("textarea")) return;
  const area = make("textarea", "edit"), row = make("div", "row");
  area.value = props.value.exchanges[index].text;
  area.setAttribute("aria-label", "Your question, edited");
  area.rows = Math.min(8, area.value.split("\n").length + 1);
  const end = () => { area.remove(); row.remove(); asked.classList.remove("is-edited"); };
  const leave = () => { end(); asked.querySelector(".tools button").focus(); };
  const save = () => { trigger("edit", { index, text: area.value }); end(); };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); save(); }
    if (event.key === "Escape") leave();
  });
  row.append(button("Ask again", "Ask the edited question", save, "main"), button("Cancel", "Cancel", leave));
  asked.classList.add("is-edited");
  asked.append(area, row);
  area.focus();
}

function update(node, value, isLast, isBusy) {
  const urls = value.pictures.map((one) => one.url).join("\n");
  if (urls !== node.urls) {
    node.urls = urls;
    node.pictures.replaceChildren(...value.pictures.map((one) => {
      const image = make("img");
      image.src = one.url;
      image.alt = one.name;
      const frame = make("a", "frame");
      frame.append(image);
      return frame;
    }));
  }
  node.root.classList.toggle("has-pictures", value.pictures.length > 0);
  put(node.question, value.text);
  put(node.answer, value.answer || "");
  const isGrowing = isLast && isBusy;
  node.answer.classList.toggle("is-growing", isGrowing);
  const notes = { length: "The answer reached the length limit in the settings.", stopped: "Stopped.",
    failed: "The answer broke off." };
  put(node.note, isGrowing && !value.answer ? "Reading…" : isGrowing ? "" : notes[value.end] ||
    (value.answer ? "" : "The answer is empty."));
  node.actions.hidden = node.tools.hidden = isBusy;
  node.again.hidden = !isLast;
  for (const name of ["like", "dislike"]) node[name].setAttribute("aria-pressed", value.rating === name);
}

let isFirst = true;
function render() {
  const value = props.value || { exchanges: [], alert: "", busy: false };
  const isAtEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 160;
  const before = nodes.length;
  while (nodes.length > value.exchanges.length) nodes.pop().root.remove();
  value.exchanges.forEach((each, index) => {
    if (index === nodes.length) {
      nodes.push(create(index));
      log.append(nodes[index].root);
    }
    update(nodes[index], each, index === value.exchanges.length - 1, value.busy);
  });
  log.setAttribute("aria-busy", value.busy);
  welcome.hidden = nodes.length > 0;
  put(alertBox, value.alert);
  alertBox.hidden = !value.alert;
  fresh.hidden = nodes.length === 0 && !value.alert;
  if (nodes.length > before && !isFirst) nodes[nodes.length - 1].root.scrollIntoView({ block: "start" });
  else if (isAtEnd && value.busy || value.alert) scrollTo(0, document.documentElement.scrollHeight);
  isFirst = false;
}

// ---- examples, a new conversation, files in the question, state of the server

const cards = element.querySelector(".cards");
(props.examples || []).forEach((each, index) => {
  const card = button("", `Ask: ${each.text}`, () => trigger("example", { index }), "card");
  const image = make("img");
  image.src = each.url;
  image.alt = "";
  card.append(image, make("span", "", each.text));
  cards.append(card);
});
const head = document.querySelector("#head"), fresh = head.querySelector(".fresh");
fresh.addEventListener("click", () => trigger("fresh"));

let files = 0;
new MutationObserver(() => {
  const now = document.querySelectorAll("#question .thumbnail-item").length;
  if (now !== files) { files = now; trigger("attached"); }
  const area = document.querySelector("#question textarea");
  if (area && !area.getAttribute("aria-label")) area.setAttribute("aria-label", "Your question");
}).observe(document.body, { childList: true, subtree: true });

const state = head.querySelector(".state");
async function look() {
  let text = "", wait = 15000, cls = "is-well";
  try {
    const response = await fetch("health"), health = await response.json();
    cls = { ready: "is-well", failed: "is-ill" }[health.status] || "is-waiting";
    text = { ready: "ready", failed: "the model could not be loaded", stopping: "the server is stopping" }[health.status]
      || `loading: ${health.stage}, ${Math.round(health.seconds)} s`;
    if (health.status !== "ready") wait = 1000;
  } catch { text = "the server does not answer"; cls = "is-ill"; wait = 3000; }
  put(state, text);
  state.className = `state ${cls}`;
  setTimeout(look, wait);
}
look();
watch("value", render);
render();
