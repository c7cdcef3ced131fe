"use strict";
const byId = (id) => document.getElementById(id);
const GATES = {
  one: "always 1",
  all: "its probability",
  left: "its probability among those not chosen before it",
  chosen: "its share of the probability of those chosen",
  masked: "its share of the probability of those near enough to the best for training to try them, "
    + "1 where it is alone",
};
let model, text, before, after;
let swaps = new Map();  // "layer position": the experts chosen by hand
let open = null;  // the piece whose experts are shown: {layer, position}
let asked = 0;

// An element; children are elements, or text that is never read as HTML.
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}
const percent = (share) => `${share >= 0.095 ? Math.round(100 * share) : (100 * share).toFixed(1)} %`;
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
const minus = (value) => value.toFixed(3).replace("-", "−");
const sideOf = (layer) => layer.split(".")[0];
const same = (one, other) => one.join() === other.join();
const bare = (piece) => (piece === "</s>" ? "end" : piece.replace(/^▁(?=.)/, "").replace(/(?<=.)@@$/, ""));
const wordOf = (side, i) => side.pieces.filter((_, j) => side.words[j] === side.words[i])
  .map(bare).join("").replace(/^▁(?=.)/, "");
const nameOf = (side, i) => {
  const [piece, word] = [bare(side.pieces[i]), wordOf(side, i)];
  return piece === word ? `“${piece}”` : `“${piece}” of “${word}”`;
};

async function ask(path, content) {
  const options = content && {
    method: "POST", body: JSON.stringify(content), headers: {"Content-Type": "application/json"},
  };
  const reply = await fetch(path, options).catch(() => {
    throw new Error("No answer: is the command still running?");
  });
  const answer = await reply.json();
  if (!reply.ok) throw new Error(answer.error);
  return answer;
}

// Take the newest answer: one that comes later to an earlier question is dropped.
async function update(sentence, chosen) {
  const mine = ++asked;
  const content = [...chosen].map(([key, experts]) => {
    const [layer, position] = key.split(" ");
    return {layer, position: Number(position), experts};
  });
  byId("go").disabled = true;
  let [answer, problem] = [null, ""];
  try {
    answer = await ask("/translate", {text: sentence, swaps: content});
  } catch (error) {
    problem = error.message;
  }
  if (mine !== asked) return;
  byId("go").disabled = false;
  byId("problem").textContent = problem;
  byId("problem").hidden = !problem;
  if (problem) return;
  if (!chosen.size) before = answer;
  if (sentence !== text) open = null;
  [text, swaps, after] = [sentence, chosen, answer];
  render();
}

// null takes a swap back, and so does the choice that the router made where it saw the same.
function swap(layer, position, experts) {
  const [key, name, chosen] = [`${layer} ${position}`, sideOf(layer), new Map(swaps)];
  const undone = chosen.has(key) && comparable(name, position)
    && same(before[name].layers[layer][position].experts, experts || []);
  if (!experts || undone) chosen.delete(key);
  else chosen.set(key, experts);
  return update(text, chosen);
}

function colour(element, expert) {
  if (expert === undefined) return element.classList.add("plain");
  element.style.setProperty("--own", model.colours[expert % model.colours.length]);
  element.style.setProperty("--line", model.lines[expert % model.lines.length]);
}

// The words of a text, those in mark that the other text has not at this place.
function marked(words, others) {
  const table = Array.from({length: words.length + 1}, () => new Array(others.length + 1).fill(0));
  for (let i = words.length - 1; i >= 0; i--)
    for (let j = others.length - 1; j >= 0; j--)
      table[i][j] = words[i] === others[j] ? table[i + 1][j + 1] + 1
        : Math.max(table[i + 1][j], table[i][j + 1]);
  const parts = [];
  for (let i = 0, j = 0; i < words.length; i++) {
    while (j < others.length && words[i] !== others[j] && table[i][j + 1] > table[i + 1][j]) j++;
    const common = words[i] === others[j];
    if (common) j++;
    parts.push(common ? words[i] : make("mark", "", words[i]), " ");
  }
  return parts;
}

function translation(answer, other, title) {
  const words = (each) => each.translation.split(/\s+/).filter(Boolean);
  const bold = make("b", "", ...(answer.translation ? marked(words(answer), words(other)) : ["(nothing)"]));
  bold.lang = model.target_lang.replace("_", "-");
  const cut = answer.at_length_limit ? "; ends where no longer one is allowed" : "";
  return make("div", "found", bold, make("small", "", `${title}score ${minus(answer.score)}${cut}`));
}

function runnerUp(entry) {
  const others = entry.probs.map((share, expert) => ({share, expert}))
    .filter(({expert}) => !entry.experts.includes(expert));
  return others.reduce((best, each) => (best && best.share >= each.share ? best : each), null);
}

// Text of a piece, with the numbers of experts, their gates, and the next expert below it.
function numbers(element, label, entry) {
  element.append(make("span", "", label, make("sub", "", entry.experts.join(",") || "–")));
  element.append(make("small", "", entry.gates.map((gate) => `×${gate.toFixed(2)}`).join(" ") || "none"));
  const next = model.learnt && runnerUp(entry);
  if (next) element.append(make("small", "", `${next.expert}: ${percent(next.share)}`));
  colour(element, entry.experts[0]);
}

// Whether what stands at a place can be compared with what stood there before the swaps.
function comparable(name, i) {
  return name === "encoder" || (i < before.decoder.pieces.length
    && same(before.decoder.pieces.slice(0, i), after.decoder.pieces.slice(0, i)));
}
const moved = (name, layer, i) => comparable(name, i)
  && !same(before[name].layers[layer][i].experts, after[name].layers[layer][i].experts);

function pieces(name, layer) {
  const side = after[name];
  const flow = make("div", "flow");
  flow.lang = (name === "encoder" ? model.source_lang : model.target_lang).replace("_", "-");
  side.pieces.forEach((piece, i) => {
    if (!i || side.words[i] !== side.words[i - 1]) flow.append(make("span", "whole"));
    const label = /^<.*>$/.test(piece) ? make("i", "", bare(piece)) : bare(piece);
    const element = make(layer ? "button" : "span", "piece");
    flow.lastChild.append(element);
    if (!layer) {
      element.classList.add("plain");
      element.append(label);
      if (name === "decoder") element.append(make("small", "", percent(Math.exp(after.log_probs[i]))));
      return;
    }
    numbers(element, label, side.layers[layer][i]);
    const isOpen = open && open.layer === layer && open.position === i;
    element.type = "button";
    element.setAttribute("aria-expanded", String(Boolean(isOpen)));
    if (swaps.has(`${layer} ${i}`)) element.classList.add("swapped");
    else if (moved(name, layer, i)) element.classList.add("changed");
    element.addEventListener("click", () => {
      open = isOpen ? null : {layer, position: i};
      render();
      const again = document.querySelector(open ? ".panel button" : "#" + name);
      if (again) again.focus({preventScroll: true});
    });
  });
  return flow;
}

function panel() {
  const {layer, position} = open;
  const name = sideOf(layer);
  const side = after[name];
  const entry = side.layers[layer][position];
  const where = name === "encoder" ? nameOf(side, position) : `the step that writes ${nameOf(side, position)}`
    + ` (probability ${percent(Math.exp(after.log_probs[position]))})`
    + ` after ${position ? nameOf(side, position - 1) : "the start"}`;
  const box = make("div", "panel", make("p", "", `${layer}, ${where}. `));
  if (!model.swappable) {
    box.append(make("p", "soft", `Router ${model.router} lets experts choose among all pieces: `
      + "there is no choice that could be swapped alone."));
    return box;
  }
  entry.experts.forEach((current, slot) => {
    box.firstChild.append(slot ? "" : `Send ${name === "encoder" ? "it" : "this step"} to:`);
    const flow = make("div", "flow", model.top_k > 1 ? make("span", "soft", `${slot + 1}.`) : "");
    entry.probs.forEach((share, expert) => {
      const button = make("button", "piece", `expert ${expert}`);
      button.type = "button";
      colour(button, expert);
      button.setAttribute("aria-pressed", String(expert === current));
      if (model.learnt) button.append(make("small", "", `probability ${percent(share)}`));
      if (comparable(name, position) && before[name].layers[layer][position].experts[slot] === expert)
        button.append(make("small", "", "the router’s choice"));
      button.addEventListener("click", () => {
        if (expert === current) return;
        const experts = [...entry.experts];
        const taken = experts.indexOf(expert);
        if (taken >= 0) experts[taken] = current;
        experts[slot] = expert;
        swap(layer, position, experts).then(() => {
          document.querySelector(".panel [aria-pressed=true]")?.focus({preventScroll: true});
        });
      });
      flow.append(button);
    });
    box.append(flow);
  });
  return box;
}

function renderSide(name) {
  const layers = Object.keys(after[name].layers);
  const target = byId(name);
  target.replaceChildren();
  if (!layers.length || name === "decoder") {
    const title = name === "decoder" ? "what it wrote, and how probable each piece was"
      : "what it read (no layer has experts)";
    target.append(make("span", "layer name", title), pieces(name, null));
  }
  for (const layer of layers) {
    target.append(make("span", "layer name", layer), pieces(name, layer));
    if (open && open.layer === layer && open.position < after[name].pieces.length) target.append(panel());
  }
}

function renderEffect() {
  const different = before.translation !== after.translation;
  byId("effect").hidden = byId("swaps").hidden = !swaps.size;
  byId("translations").replaceChildren(translation(after, before, swaps.size ? "with your swaps: " : ""));
  byId("swaps").replaceChildren();
  if (!swaps.size) return;
  const former = translation(before, after, "as the router chose: ");
  former.classList.add("former");
  byId("translations").append(former);
  let [count, all] = [0, 0];
  for (const name of ["encoder", "decoder"])
    for (const layer of Object.keys(after[name].layers))
      after[name].pieces.forEach((_, i) => {
        if (swaps.has(`${layer} ${i}`) || !comparable(name, i)) return;
        all += 1;
        count += moved(name, layer, i);
      });
  byId("effect").textContent = `The translation ${different ? "is another" : "stays the same"}; `
    + `its score changes by ${signed(after.score - before.score)}. `
    + `Elsewhere${different ? ", up to where the translations part," : ""} `
    + `the router now chooses other experts at ${count} of ${all} places.`;
  for (const [key, experts] of swaps) {
    const [layer, position] = key.split(" ");
    const side = after[sideOf(layer)];
    const place = position < side.pieces.length ? nameOf(side, Number(position))
      : `step ${position}, which is not reached`;
    const chip = make("button", "swap", `${layer}, ${place} → ${experts.join(",")} ✕`);
    chip.type = "button";
    chip.title = "take this swap back";
    chip.addEventListener("click", () => swap(layer, Number(position), null));
    byId("swaps").append(chip);
  }
  if (swaps.size > 1) {
    const all = make("button", "swap", "take all back");
    all.type = "button";
    all.addEventListener("click", () => update(text, new Map()));
    byId("swaps").append(all);
  }
}

function render() {
  byId("result").hidden = false;
  renderEffect();
  renderSide("encoder");
  renderSide("decoder");
}

function describe() {
  const layers = Object.entries(model.layers);
  const most = Math.max(0, ...layers.map(([, experts]) => experts));
  byId("language").textContent = ` (${model.source_lang}, at most ${model.most_pieces} pieces)`;
  byId("model").textContent = `${model.model}, ${model.source_lang} to ${model.target_lang}: `
    + (most ? `router ${model.router}, ${most} experts in ${layers.map(([name]) => name).join(", ")}.`
      : "a dense model, without experts.");
  byId("guide").hidden = !most;
  if (!most) return;
  for (let expert = 0; expert < Math.min(most, 16); expert++) {
    const sample = make("span", "piece", "expert", make("sub", "", String(expert)));
    colour(sample, expert);
    byId("legend").append(sample, " ");
  }
  if (most > 16) byId("legend").append("and so on");
  const each = model.top_k === 1 ? "one expert" : `${model.top_k} experts`;
  const power = model.lenpen === 1 ? "" : ` to the power of ${model.lenpen}`;
  const lines = [
    "Words are cut into pieces, and in each layer named below "
      + `${model.swappable ? `a router sends every piece to ${each}` : "experts choose their pieces"}: `
      + "colour and small number.",
    `×1.00 is the gate, the factor on the expert’s output${model.gate ? `: ${GATES[model.gate]}` : ""}.`,
    model.learnt ? "0: 25 % is the runner-up, the most probable of the experts that were not chosen."
      : "This router learns no choice, so that there is no runner-up.",
    "In the decoder a column is a step, which reads the piece before and writes the one that stands there.",
    `The score is the log-probability of all pieces over their number${power}: the nearer to 0, the surer.`,
  ];
  if (!model.swappable) lines.push("Choices cannot be swapped: with this router experts choose their pieces.");
  else
    lines.push("Press a piece to send it to another expert. A solid frame is your choice, a dashed one "
      + "a place where the router chooses another expert because of it. "
      + (model.beam > 1 ? `In the decoder a swap holds at its step for all ${model.beam} hypotheses of `
        + "the search, of which another may win, with other words before it, too." : ""));
  byId("meaning").replaceChildren(...lines.map((line) => make("li", "", line)));
  byId("guide").open = innerWidth > 640;
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  update(byId("text").value, new Map());
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("form").requestSubmit();
});
ask("/model").then((answer) => {
  model = answer;
  describe();
}, (error) => { byId("model").textContent = error.message; });
