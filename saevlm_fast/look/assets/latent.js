"use strict";
// Everything about one latent.
const Latent = (() => {
  function part(title, ...children) {
    return el("section", { class: "part" }, el("h3", { text: title }), ...children);
  }

  function bars(rows, describe) {
    return el("ul", { class: "bars" }, rows.map(([name, value, share, note]) => {
      const bar = el("span", { class: "fill" });
      bar.style.width = `${Math.max(1, Math.min(100, 100 * share))}%`;
      return el("li", {}, el("span", { class: "label", text: name }), el("span", { class: "track", "aria-hidden": "true" }, bar),
        el("span", { class: "value", text: describe(value) }), note ? el("span", { class: "note", text: note }) : null);
    }));
  }

  // The share of others that are below a value; of equal ones, half. others: without the value itself, if it is one.
  function rankOf(column, value, isOne) {
    let below = 0, equal = isOne ? -1 : 0, known = equal;
    for (const other of column) {
      if (Number.isNaN(other)) continue;
      known++;
      if (other < value) below++;
      else if (other === value) equal++;
    }
    return known > 0 ? (below + equal / 2) / known : null;
  }

  function measures(app, sae, latent) {
    const other = app.index.saes[app.index.control];
    const control = other && other !== sae ? other : null;
    const rows = sae.measures.filter((m) => !/_(low|high|lower|upper|ci_low|ci_high)$/.test(m.key)).map((m) => {
      const column = sae.column[m.key], value = column[latent];
      const [low, high] = ["low", "high"].map((end) => interval(sae, m.key, end, latent));
      const within = low !== null && high !== null ? `${digits(low)} to ${digits(high)}` : "";
      const rank = Number.isNaN(value) ? null : rankOf(column, value, true);
      const held = control && !Number.isNaN(value) && control.column[m.key] ? rankOf(control.column[m.key], value, false) : null;
      const fill = el("span", { class: "fill" });
      if (rank !== null) fill.style.width = `${100 * rank}%`;
      return el("tr", { title: m.help }, el("th", { scope: "row", text: m.label }), el("td", {}, digits(value), within ? el("span", { class: "within", text: within }) : null),
        el("td", { class: "place" }, rank === null ? "–" : el("span", { class: "track", "aria-hidden": "true" }, fill)),
        el("td", { text: rank === null ? "" : `${Math.round(100 * rank)}` }),
        control ? el("td", { text: held === null ? "–" : `${Math.round(100 * held)}` }) : null);
    });
    const head = ["measure", "value", "among all", "percentile", ...(control ? ["in control"] : [])];
    return [el("table", { class: "measures" }, el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col", text, class: text === "among all" ? "place" : null })))), el("tbody", {}, rows)),
      app.index.encoder && sae.column.ms ? el("p", { class: "note", text: `MS by ${app.index.encoder}; below it its interval of 95 % over images.` }) : null,
      control ? el("p", { class: "note", text: `In control: its percentile among the latents of ${control.name}, which cannot have learned.` }) : null];
  }

  // What a table of scores says of a latent in words.
  function noted(record) {
    if (!record.n) return null;
    return el("div", { class: "hideable" }, part("From the table of scores", el("dl", { class: "facts" }, record.n.map(([name, text]) => el("div", {}, el("dt", { text: name }), el("dd", { text }))))));
  }

  const ALPHAS = [["half its largest", 0.5], ["its largest", 1], ["twice", 2], ["five times", 5], ["against it", -1]];

  // The command at a strength; and what steering did, where that was measured.
  function steering(app, sae, latent, record) {
    if (!sae.steer) return null; // a control that is nowhere but here
    const code = el("code", { class: "command", text: app.steer(sae, latent) });
    const choose = el("select", { "aria-label": "Strength", onchange: () => { code.textContent = app.steer(sae, latent, Number(choose.value)); } },
      ALPHAS.map(([text, share]) => el("option", { value: String(share), text, selected: share === 1 })));
    const copy = el("button", { type: "button", text: "Copy", "aria-label": "Copy this command", onclick: () => app.copy(code.textContent, "command") });
    const found = [el("div", { class: "tools" }, el("label", { class: "pick" }, "Strength", choose), copy), code];
    if (record.z) {
      const { answer, share, rows } = record.z;
      if (answer !== null) found.push(el("p", { class: "hideable" }, "Most frequent answer: ", el("q", { text: answer }), share === null ? "" : `, ${percent(share)} of the answers`));
      found.push(el("table", { class: "plain" }, el("thead", {}, el("tr", {}, ["condition", "score", "empty answers"].map((text) => el("th", { scope: "col", text })))),
        el("tbody", {}, rows.map(([name, score, empty]) => el("tr", {}, el("th", { scope: "row", text: name.replace(/_/g, " ") }), el("td", { text: digits(score) }), el("td", { text: empty === null ? "–" : percent(empty) }))))),
        el("p", { class: "note", text: "All but the first are controls: steering that does more than they do is the latent's." }));
    }
    return part("Steering", found);
  }

  function origin(app, sae) {
    const rows = [["SAE", sae.path], ["rows", `${sae.rows} (${digits(sae.nRows)})`], ["images", digits(sae.nImages)], ["made", `${app.index.made}, saevlm-fast ${app.index.version}`]];
    if (app.index.encoder) rows.push(["embeddings", app.index.encoder]);
    return el("details", {}, el("summary", { text: "Where this is from" }), el("dl", { class: "facts" }, rows.map(([name, text]) => el("div", {}, el("dt", { text: name }), el("dd", { class: "path", text })))));
  }

  function interval(sae, key, end, latent) {
    const names = { low: [`${key}_low`, `${key}_lower`, `${key}_ci_low`], high: [`${key}_high`, `${key}_upper`, `${key}_ci_high`] }[end];
    const found = names.find((name) => sae.column[name]);
    return found ? sae.column[found][latent] : null;
  }

  function pictures(app, sae, latent, list, side) {
    return el("div", { class: "pictures" }, list.map((picture) => Pictures.figure(picture, { grid: sae.grid, latent, side })));
  }

  function heatTools(app, sae, root, max) {
    if (!sae.grid) return el("p", { class: "note", text: `No heat maps: ${sae.noGrid}.` });
    const box = (id, label, key) => el("label", { class: "check" }, el("input", { type: "checkbox", checked: Pictures.look[key], "data-heat": key,
      onchange: (event) => {
        Pictures.look[key] = event.target.checked;
        document.querySelectorAll(`input[data-heat="${key}"]`).forEach((other) => { other.checked = event.target.checked; });
        Pictures.redrawAll(document);
        document.querySelectorAll(".most").forEach((end) => { end.textContent = most(end.dataset.most); });
      } }), label);
    const most = (text) => (Pictures.look.own ? "each one's largest" : text);
    const ramp = el("canvas", { width: 160, height: 12, class: "ramp", role: "img", "aria-label": `Colours of the heat map, from 0 to ${digits(max)}` });
    const pen = ramp.getContext("2d");
    for (let x = 0; x < 160; x++) {
      pen.fillStyle = `rgba(${viridis(x / 159).join(",")},${0.75 * Math.sqrt(x / 159)})`;
      pen.fillRect(x, 0, 1, 12);
    }
    return el("div", { class: "heat" }, box("heat", "heat maps", "heat"), box("smooth", "smooth", "smooth"), box("own", "each picture its own scale", "own"), box("edge", "contour", "edge"),
      el("span", { class: "legend" }, "0", ramp, el("span", { class: "most", "data-most": digits(max), text: most(digits(max)) })),
      el("span", { class: "note", text: "Where it fires, not why." }));
  }

  const FARTHEST = 40; // bins

  function histogramOf(record, sae, latent, { bins, pool }) {
    if (!record.g) return null;
    let [first, counts] = record.g;
    const silent = sae.nImages - counts.reduce((a, b) => a + b, 0);
    const cut = !sae.threshold ? null : sae.threshold.length > 1 ? sae.threshold[latent] : sae.threshold[0];
    const threshold = cut > 0 && !(sae.pooled && pool === "mean") ? cut : null; // a threshold is of rows, not of their mean
    let line = threshold === null ? null : (Math.log2(threshold) - bins.lowest) * bins.octave - first;
    if (line !== null && line < 0) { // empty bins, so that the line is at its place, unless that is very far
      const more = Math.ceil(-line);
      if (more > FARTHEST) line = null;
      else [first, counts, line] = [first - more, [...new Array(more).fill(0), ...counts], line + more];
    }
    const edge = (i) => 2 ** (bins.lowest + (first + i) / bins.octave);
    const chart = barChart({
      counts, log: true, line, labels: [digits(edge(0)), "activation (log)", digits(edge(counts.length))],
      title: `Images by activation, from ${digits(edge(0))} to ${digits(edge(counts.length))}; most in a bar: ${Math.max(...counts)}`,
      describe: (i, count) => `${digits(edge(i))} to ${digits(edge(i + 1))}: ${count} images`,
    });
    return part("Activations", chart, el("p", { class: "note", text: `Heights are logarithmic.${threshold === null ? "" : ` It fires above ${digits(threshold)}, ${line === null ? "left of the first bar" : "the line"}.`} It is silent on ${silent.toLocaleString("en")} of ${sae.nImages.toLocaleString("en")} images.` }));
  }

  function bandsOf(app, sae, latent, record) {
    const total = record.b.reduce((sum, [count]) => sum + count, 0);
    const max = sae.column.max ? sae.column.max[latent] : NaN;
    const rows = record.b.map(([count, list], band) => {
      if (!count) return null;
      const head = el("div", { class: "bandhead" }, el("b", { text: `${10 * band}–${10 * (band + 1)} %` }),
        el("span", { text: `${digits((max * band) / 10)} to ${digits((max * (band + 1)) / 10)}` }),
        el("span", { text: `${count.toLocaleString("en")} images, ${percent(count / total)}` }));
      return el("div", { class: "band" }, head, pictures(app, sae, latent, list, 72));
    });
    return part("Over its range", el("p", { class: "note", text: "Images drawn at random from each tenth of its range up to the largest activation: the top images alone flatter a latent." }),
      rows.reverse());
  }

  function neighbours(app, sae, title, note, list) {
    if (!list || !list.length) return null;
    return part(title, el("ul", { class: "links" }, list.map(([other, value]) => el("li", {},
      el("button", { type: "button", class: "link", onclick: () => app.open(other, app.index.saes.indexOf(sae)) }, `${other}`),
      el("span", { class: "value", text: digits(value) }), el("span", { class: "hideable", text: app.nameOf(sae, other) || app.classOf(sae, other) || "" })))),
      el("p", { class: "note", text: note }));
  }

  function nearMisses(app, sae, latent, record) {
    if (!record.m || !record.m.length) return null;
    const what = sae.threshold ? "below the threshold" : sae.architecture === "relu" ? "not above 0" : "not among the largest of a row";
    const figures = record.m.map(([tile, value]) => Pictures.figure([tile], { grid: null, latent, side: 72, note: digits(value) }));
    return part("Near misses", el("p", { class: "note", text: `Silent images with the highest pre-activation, ${what}; of ${sae.near.images.toLocaleString("en")} images that were tried.` }), el("div", { class: "pictures" }, figures));
  }

  function group(sae, latent) {
    if (sae.groups.length < 2) return null;
    let end = 0;
    const at = sae.groups.findIndex((size) => latent < (end += size));
    return el("span", { class: "chip", text: `group ${at + 1} of ${sae.groups.length}` });
  }

  async function show(app, root, number, latent, { pinned = false } = {}) {
    const sae = app.index.saes[number];
    const size = app.index.chunk;
    root.dataset.asked = `${number}/${latent}`;
    let chunk;
    try {
      chunk = await SAEVLM.load(`s${number}/chunk/${Math.floor(latent / size)}`);
    } catch (error) {
      root.replaceChildren(el("p", { class: "problem", text: String(error.message) }));
      return;
    }
    if (root.dataset.asked !== `${number}/${latent}`) return;
    const record = chunk[latent % size];
    root.replaceChildren(heading(app, sae, number, latent, record, pinned));
    const max = sae.column.max ? sae.column.max[latent] : NaN;
    if (!record.t) {
      root.append(el("p", { class: "problem", text: "It fires on none of the images." }));
      add(root, el("div", { class: "columns" }, part("Measures", measures(app, sae, latent)), neighbours(app, sae, "Nearest by decoder", "Cosine of decoder directions.", record.d)),
        nearMisses(app, sae, latent, record), origin(app, sae));
      return;
    }
    root.append(part("Top images", heatTools(app, sae, root, sae.heatMax ? sae.heatMax[latent] : max), pictures(app, sae, latent, record.t, 112)));
    const columns = el("div", { class: "columns" });
    add(columns, histogramOf(record, sae, latent, app.index), part("Measures", measures(app, sae, latent)));
    if (record.w) {
      const best = Math.max(...record.w.map(([, score]) => score), 1e-9);
      const own = sae.names && sae.names[latent];
      columns.append(el("div", { class: "hideable" }, part("Nearest words", bars(record.w.map(([word, score]) => [word, score, score / best]), digits),
        el("p", { class: "note", text: own ? "Nearer than the words of chance directions." : "No name of its own: directions of chance have words as near." }))));
    }
    if (record.c && sae.classes) {
      columns.append(el("div", { class: "hideable" }, part("Classes", bars(record.c.map(([c, share]) => [sae.classes.names[c], share, share, `${percent(sae.classes.shares[c])} of images`]), percent),
        el("p", { class: "note", text: "Share of its activation, and of all images." }))));
    }
    add(columns, noted(record));
    const counted = `counted on ${sae.togetherImages.toLocaleString("en")} images`;
    const same = record.u === undefined ? [] : [[record.u, 1 - sae.column.uniqueness[latent]]];
    for (const each of [
      neighbours(app, sae, "Nearest by decoder", "Cosine of decoder directions.", record.d),
      neighbours(app, sae, "Fires together with", `Jaccard index of the images, ${counted}.`, record.f),
      neighbours(app, sae, "Parents", `Wider latents that fire wherever it does: share of its images, at least and less chance, ${counted}.`, record.p),
      neighbours(app, sae, "Children", `Narrower latents that fire only where it does: share of their images, at least and less chance, ${counted}.`, record.k),
      neighbours(app, sae, "Same top images", "Jaccard index of the 16 most active images.", same),
      steering(app, sae, latent, record),
    ]) if (each) columns.append(each);
    root.append(columns, bandsOf(app, sae, latent, record));
    add(root, nearMisses(app, sae, latent, record));
    if (record.s && record.s.length) root.append(part("Silent on", el("p", { class: "note", text: "Images drawn at random." }), pictures(app, sae, latent, record.s.map((tile) => [tile]), 72)));
    root.append(origin(app, sae));
  }

  function heading(app, sae, number, latent, record, pinned) {
    const name = app.nameOf(sae, latent);
    const starred = app.favourites(number).has(latent);
    // What a sign means is said; words say it themselves.
    const button = (text, label, action) => el("button", { type: "button", text, "aria-label": /^[\w ]+$/.test(text) ? null : label, title: label, onclick: action });
    const tools = pinned
      ? [button("Unpin", "Unpin this latent", () => app.set({ pin: "" })), button("Go", "Open this latent", () => app.open(latent, number))]
      : [
          button("←", "Previous latent in the list (k)", () => app.step(-1)),
          button("→", "Next latent in the list (j)", () => app.step(1)),
          button(starred ? "★" : "☆", starred ? "Remove the star" : "Star this latent", () => app.star(latent)),
          button("Pin", "Keep it here, beside the next", () => app.set({ pin: `${number}.${latent}` })),
          button("Copy link", "Copy a link to this latent", () => app.copy(app.link(latent, number), "link")),
          sae.steer ? button("Copy steer command", "Copy the command that steers a model by this latent", () => app.copy(app.steer(sae, latent), "command")) : null,
        ];
    const dead = !record.t ? el("span", { class: "chip warn", text: "never fires" }) : null;
    const titles = el("div", { class: "titles" }, el("h2", {}, `Latent ${latent}`, name ? el("span", { class: "hideable own", text: name }) : null), dead, app.classOf(sae, latent) ? el("span", { class: "chip hideable", text: app.classOf(sae, latent) }) : null, group(sae, latent),
      app.index.saes.length > 1 ? el("span", { class: "chip", text: sae.name }) : null);
    return el("div", { class: "heading" }, titles, el("div", { class: "buttons" }, ...tools));
  }

  return { show };
})();
