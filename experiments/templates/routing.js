"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const numbers = text => {
    const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Array.from({length: bytes.length / 2},
                      (_, i) => view.getUint16(2 * i, true));
  };
  // [layer][piece][choice]
  const experts = numbers(data.experts), weights = numbers(data.weights);
  const text = document.getElementById("text");
  const panel = document.getElementById("panel");
  const chooser = document.getElementById("chooser");
  const legend = document.getElementById("legend");
  const pieces = Array.from(text.querySelectorAll("span"));
  let layer = 0, at = null, alone = null;
  const place = (l, i) => (l * pieces.length + i) * data.choices;
  const first = (l, i) => experts[place(l, i)];

  const colour = () => pieces.forEach((piece, i) => {
    const expert = first(layer, i);
    piece.className = (expert < data.num_experts ? "x" + expert : "")
        + (piece.dataset.n ? " n" : "") + (i === at ? " at" : "")
        + (expert === alone ? " lit" : "");
  });
  const element = (name, className, content) => {
    const made = document.createElement(name);
    made.className = className;
    made.textContent = content;
    return made;
  };
  const describe = () => {
    panel.hidden = at === null;
    if (at === null) return;
    panel.replaceChildren(
        element("code", "", data.pieces[at]),
        element("span", "note", data.kinds[data.kind[at]]));
    const start = place(layer, at);
    for (let a = start; a < start + data.choices; a++)
      if (experts[a] < data.num_experts)
        panel.append(element("span", "mark x" + experts[a],
                             experts[a] + " : " + (weights[a] / 1000).toFixed(2)));
    if (data.layers.length > 1) {
      const path = element("span", "path", "");
      path.append(element("span", "note", "first, by layer "));
      data.layers.forEach((_, l) => {
        const expert = first(l, at), there = expert < data.num_experts;
        path.append(element("span", "mark" + (there ? " x" + expert : ""),
                            there ? expert : "\u2013"));
      });
      panel.append(path);
    }
  };
  const look = event => {
    const i = pieces.indexOf(event.target);
    if (i < 0 || i === at) return;
    if (at !== null) pieces[at].classList.remove("at");
    at = i;
    pieces[at].classList.add("at");
    describe();
  };
  const choose = () => {
    const chosen = chooser.querySelector("input:checked, input[type=range]");
    layer = Number(chosen.value);
    const output = chooser.querySelector("output");
    if (output) output.textContent = data.layers[layer];
    document.querySelectorAll(".layer").forEach(
        block => { block.hidden = Number(block.dataset.layer) !== layer; });
    colour();
    describe();
  };

  pieces.forEach(piece => piece.removeAttribute("title"));
  text.addEventListener("pointerover", look);
  text.addEventListener("click", look);
  chooser.addEventListener("input", choose);
  legend.addEventListener("click", event => {
    if (!event.target.matches("button")) return;
    const expert = Number(event.target.value);
    alone = alone === expert ? null : expert;
    legend.querySelectorAll("button").forEach(button => button.setAttribute(
        "aria-pressed", String(Number(button.value) === alone)));
    text.classList.toggle("alone", alone !== null);
    colour();
  });
  chooser.hidden = data.layers.length < 2;
  choose();
})();
