"use strict";
// The SAEs as wholes: how every measure lies, density against the score, dead and dense latents, the recipe.
const Overview = (() => {
  const chosen = { x: "density", y: "ms", colour: "purity", measure: "ms" };

  function pick(app, label, key, keys, none = false) {
    const saes = app.index.saes;
    const names = new Map(saes.flatMap((sae) => sae.measures.map((m) => [m.key, m.label])));
    return el("label", { class: "pick" }, label, el("select", { onchange: (event) => { chosen[key] = event.target.value; app.update(); } },
      none ? el("option", { value: "", text: "none", selected: !chosen[key] }) : null,
      keys.map((each) => el("option", { value: each, text: names.get(each) || each, selected: each === chosen[key] }))));
  }

  function sane(keys, wanted, others) {
    if (keys.includes(wanted)) return wanted;
    return others.find((key) => keys.includes(key)) || keys[0];
  }

  function show(app, root) {
    const saes = app.index.saes;
    const keys = [...new Set(saes.flatMap((sae) => sae.measures.map((m) => m.key)))];
    chosen.x = sane(keys, chosen.x, ["density"]);
    chosen.y = sane(keys, chosen.y, ["ms", "purity", "max", "decoder_cosine"]);
    chosen.measure = sane(keys, chosen.measure, ["ms", "purity", "density"]);
    if (chosen.colour && !keys.includes(chosen.colour)) chosen.colour = sane(keys, chosen.colour, ["decoder_cosine", "max"]);
    const tools = el("div", { class: "tools" }, pick(app, "Distribution of", "measure", keys), pick(app, "Across", "x", keys), pick(app, "Up", "y", keys), pick(app, "Colour", "colour", keys, true));
    const range = shared(saes, chosen.measure);
    const spans = Object.fromEntries(["x", "y", "colour"].map((key) => [key, bounds(saes.map((sae) => sae.column[chosen[key]]).filter(Boolean), key !== "colour" && isLog(chosen[key]))]));
    root.replaceChildren(el("h2", { text: saes.length > 1 ? `${saes.length} SAEs side by side` : "The SAE" }), about(app), tools,
      el("div", { class: "cards" }, saes.map((sae, i) => card(app, sae, i, range, spans))));
    root.querySelectorAll("canvas.scatter").forEach((canvas) => canvas.drawNow());
  }

  function about(app) {
    const { images } = app.index;
    const missing = images.wanted ? (images.missing ? `; ${images.missing.toLocaleString("en")} of them ${images.missing === 1 ? "is" : "are"} missing` : "") : "; pictures were left out";
    return el("p", { class: "note", text: `${images.shown.toLocaleString("en")} image${images.shown === 1 ? " is" : "s are"} shown${missing}${images.problem && images.wanted ? ` (${images.problem})` : ""}. Made ${app.index.made} by saevlm-fast ${app.index.version}.` });
  }

  const isLog = (key) => ["density", "row_density", "n_active", "max", "mean"].includes(key);

  // One range for all SAEs, so that they can be compared.
  function shared(saes, key) {
    const all = saes.map((sae) => sae.column[key]).filter(Boolean).map((values) => histogram(values, { log: isLog(key) })).filter((h) => h.n);
    return all.length ? [Math.min(...all.map((h) => h.low)), Math.max(...all.map((h) => h.high))] : null;
  }

  function quantiles(values) {
    const good = Float64Array.from(Array.from(values).filter((v) => Number.isFinite(v))).sort();
    const at = (q) => (good.length ? good[Math.min(good.length - 1, Math.round(q * (good.length - 1)))] : NaN);
    return [at(0.05), at(0.5), at(0.95), good.length];
  }

  function card(app, sae, number, range, spans) {
    const column = sae.column[chosen.measure];
    const measure = sae.measures.find((m) => m.key === chosen.measure);
    const found = column ? histogram(column, { log: isLog(chosen.measure), range }) : { counts: [] };
    const edge = (i) => { const v = found.low + ((found.high - found.low) * i) / found.counts.length; return found.log ? 10 ** v : v; };
    const distribution = found.n
      ? barChart({ counts: found.counts, labels: [digits(edge(0)), measure.label, digits(edge(found.counts.length))],
          title: `${measure.label} of ${found.n} latents, from ${digits(edge(0))} to ${digits(edge(found.counts.length))}`,
          describe: (i, count) => `${digits(edge(i))} to ${digits(edge(i + 1))}: ${count} latents` })
      : el("p", { class: "note", text: column ? `${measure.label}: none that is above 0, and the axis is logarithmic` : "not measured of this SAE" });
    const plot = el("canvas", { class: "scatter", role: "img", "aria-label": `${chosen.y} against ${chosen.x} of every latent; the list has the numbers` });
    plot.drawNow = () => {
      const style = getComputedStyle(document.body);
      const [x, y] = [sae.column[chosen.x], sae.column[chosen.y]];
      if (x && y) scatter(plot, { x, y, colour: sae.column[chosen.colour], xs: spans.x, ys: spans.y, colours: spans.colour, logX: isLog(chosen.x), logY: isLog(chosen.y), ink: style.getPropertyValue("--ink"), grid: style.getPropertyValue("--rule"),
        dark: document.documentElement.dataset.theme === "dark", chosen: app.state.sae === number ? app.state.latent : null, onPick: (latent) => app.open(latent, number) });
    };
    const density = sae.column.density;
    let dead = 0, dense = 0;
    for (const d of density || []) {
      if (d === 0) dead++;
      if (d > 0.1) dense++;
    }
    const facts = [["latents", digits(sae.dSae)], ["never fire", `${digits(dead)} (${percent(dead / sae.dSae)})`], ["fire on more than 10 % of images", `${digits(dense)} (${percent(dense / sae.dSae)})`],
      ["images", digits(sae.nImages)], ["rows", digits(sae.nRows)], ["latents an image", digits((density || []).reduce((a, b) => a + b, 0))]];
    if (sae.near) {
      const explained = sae.near.explained[sae.near.explained.length - 1];
      facts.push([`explained variance, of ${digits(sae.near.rows)} rows`, explained === null ? "–" : percent(explained)]);
    }
    if (sae.names) facts.push(["with a name of their own", digits(sae.names.filter(Boolean).length)]);
    return el("article", { class: "card" }, el("h3", {}, sae.name, number === app.index.control ? el("span", { class: "chip", text: "control" }) : null), el("p", { class: "note path", text: `${sae.path} on ${sae.rows}` }),
      el("dl", { class: "facts" }, facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: value })))),
      distribution, plot,
      el("p", { class: "note", text: `Each point a latent: ${label(sae, chosen.x)} across, ${label(sae, chosen.y)} up${chosen.colour ? `, coloured by ${label(sae, chosen.colour)} from ${digits(spans.colour[0])} (violet) to ${digits(spans.colour[1])} (yellow)` : ""}. Click one to open it.` }),
      groups(sae), summary(sae), recipe(sae));
  }

  const label = (sae, key) => (sae.measures.find((m) => m.key === key) || { label: key }).label;

  function table(head, rows, kind = "plain numbers") {
    return el("table", { class: kind }, el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col", text })))),
      el("tbody", {}, rows.map(([name, ...cells]) => el("tr", {}, el("th", { scope: "row", text: name }), cells.map((text) => el("td", { text }))))));
  }

  function summary(sae) {
    return table(["measure", "5 %", "median", "95 %", "known"], sae.measures.map((m) => {
      const [low, middle, high, n] = quantiles(sae.column[m.key]);
      return [m.label, digits(low), digits(middle), digits(high), digits(n)];
    }));
  }

  function groups(sae) {
    if (sae.groups.length < 2) return null;
    const keys = ["density", "ms", "purity", "max"].filter((key) => sae.column[key]);
    let start = 0;
    const rows = sae.groups.map((size, i) => {
      const explained = sae.near ? sae.near.explained[i] : undefined;
      const row = [`group ${i + 1} (${size})`, ...(sae.near ? [explained === null ? "–" : percent(explained)] : []), ...keys.map((key) => digits(quantiles(sae.column[key].subarray(start, start + size))[1]))];
      start += size;
      return row;
    });
    return el("div", {}, el("h4", { text: "Matryoshka groups" }), el("p", { class: "note", text: `${sae.near ? "Explained: variance of the rows by this group and those before it. " : ""}Of the measures, medians.` }), table(["group", ...(sae.near ? ["explained"] : []), ...keys.map((key) => label(sae, key))], rows));
  }

  function recipe(sae) {
    return el("details", {}, el("summary", { text: "Recipe" }), table(["setting", "value"], sae.recipe, "plain"));
  }

  return { show };
})();
