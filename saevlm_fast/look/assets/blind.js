"use strict";
// A check by eye that does not know what it looks at: latents of an SAE and of the control in one random order.
const Blind = (() => {
  const VERDICTS = [["one", "One thing"], ["several", "Several things"], ["none", "Nothing in common"]];
  const FEWEST = 10; // images of a latent
  let order = null, of = -1;

  // The same order every time: by a hash of SAE and latent.
  function hash(sae, latent) {
    let h = Math.imul(latent + 1, 0x9e3779b1) ^ Math.imul(sae + 1, 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 15), 0x2c1b3c6d);
    h = Math.imul(h ^ (h >>> 12), 0x297a2d39);
    return (h ^ (h >>> 15)) >>> 0;
  }

  function alive(app, number) {
    const found = [];
    app.index.saes[number].column.n_active.forEach((n, latent) => { if (n >= FEWEST) found.push([number, latent]); });
    return found.sort((a, b) => hash(...a) - hash(...b));
  }

  // As many of the one as of the other, in pairs of which either may come first.
  function sequence(app) {
    const number = app.state.sae === app.index.control ? 0 : app.state.sae;
    if (order && of === number) return order;
    const mine = alive(app, number), control = alive(app, app.index.control);
    order = [];
    for (let i = 0; i < Math.min(mine.length, control.length); i++) order.push(...(hash(7, i) & 1 ? [mine[i], control[i]] : [control[i], mine[i]]));
    of = number;
    return order;
  }

  const key = ([sae, latent]) => `${sae}.${latent}`;

  function counts(app, verdicts) {
    return app.index.saes.map((sae, number) => {
      const own = Object.entries(verdicts).filter(([name]) => name.startsWith(`${number}.`)).map(([, verdict]) => verdict);
      return [sae.name, own.length, ...VERDICTS.map(([name]) => own.filter((verdict) => verdict === name).length)];
    }).filter((row) => row[1]);
  }

  function save(app, verdicts) {
    const rows = Object.entries(verdicts).map(([name, verdict]) => {
      const [sae, latent] = name.split(".").map(Number);
      return { sae: app.index.saes[sae].path, control: sae === app.index.control, latent, verdict };
    });
    app.save("verdicts.json", { format: "saevlm-fast verdicts", title: app.index.title, verdicts: rows });
  }

  // Hours of judging are not lost by one wrong click.
  function anew(app, done) {
    const button = el("button", { type: "button", text: "Start anew", onclick: () => {
      if (done && !button.dataset.sure) {
        button.dataset.sure = "1";
        button.textContent = `Forget all ${done}?`;
        return;
      }
      app.memory.write("verdicts", {});
      app.update(true);
    } });
    return button;
  }

  async function show(app, root) {
    const verdicts = app.memory.read("verdicts") || {};
    const list = sequence(app), next = list.find((pair) => !(key(pair) in verdicts));
    const done = list.filter((pair) => key(pair) in verdicts).length;
    const tools = el("div", { class: "tools" }, el("span", { class: "note", text: `${done} of ${list.length} judged.` }),
      el("button", { type: "button", text: "Save verdicts", onclick: () => save(app, verdicts) }),
      el("button", { type: "button", text: "Count", onclick: () => summary.replaceChildren(table(app, verdicts)) }),
      anew(app, done));
    const summary = el("div", {});
    const about = el("p", { class: "note", text: "Latents of the SAE and of the control, mixed. What do the images have in common? Keys 1, 2, 3." });
    root.replaceChildren(el("h2", { text: "Blind check" }), about, tools, summary);
    if (!next) {
      root.append(el("p", { text: list.length ? "All are judged." : "No latent fires on ten images or more." }));
      return;
    }
    const [number, latent] = next, sae = app.index.saes[number];
    root.dataset.asked = key(next);
    const chunk = await SAEVLM.load(`s${number}/chunk/${Math.floor(latent / app.index.chunk)}`);
    if (root.dataset.asked !== key(next)) return;
    const record = chunk[latent % app.index.chunk];
    const half = record.b.slice(4, 6).flatMap(([, list]) => list).slice(0, 8);
    const figures = (list, side) => el("div", { class: "pictures" }, list.map((picture) => Pictures.figure([picture[0], undefined, picture[2]], { grid: sae.grid, latent: null, side })));
    const judge = (verdict) => { verdicts[key(next)] = verdict; app.memory.write("verdicts", verdicts); app.update(true); };
    const buttons = VERDICTS.map(([name, text], i) => el("button", { type: "button", text, "data-verdict": name, "data-key": String(i + 1), onclick: () => judge(name) }));
    add(root, el("h3", { text: "Its top images" }), figures(record.t, 112), half.length ? [el("h3", { text: "At half its strength" }), figures(half, 112)] : null,
      el("div", { class: "tools verdicts" }, buttons));
  }

  function table(app, verdicts) {
    const head = ["", "judged", ...VERDICTS.map(([, text]) => text.toLowerCase())];
    return el("table", { class: "plain" }, el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col", text: text || "SAE" })))),
      el("tbody", {}, counts(app, verdicts).map(([name, ...numbers]) => el("tr", {}, el("th", { scope: "row", text: name }), numbers.map((n) => el("td", { text: String(n) }))))));
  }

  return { show };
})();
