"use strict";
// The page: its state, which is what stands after # in its address, and what the parts ask of it.
(() => {
  const index = SAEVLM.get("index");
  SAEVLM.single = SAEVLM.has("s0/chunk/0");
  for (const sae of index.saes) {
    sae.column = Object.create(null); // a table may call a column __proto__
    for (const measure of sae.measures) sae.column[measure.key] = SAEVLM.floats(measure.values);
    if (sae.heatMax) sae.heatMax = SAEVLM.floats(sae.heatMax);
  }

  const memory = {
    key: `saevlm-fast ${index.title} ${index.saes.map((sae) => sae.path).join(" ")}`,
    read(name) {
      try { return JSON.parse(localStorage.getItem(`${this.key} ${name}`)); } catch { return null; }
    },
    write(name, value) {
      try { localStorage.setItem(`${this.key} ${name}`, JSON.stringify(value)); } catch { /* a page without memory works too */ }
    },
  };
  const stars = memory.read("stars") || {};

  const start = { sae: 0, latent: null, sort: "", desc: true, q: "", stars: "", view: "", pin: "", filters: [] };
  const app = {
    index,
    memory,
    state: { ...start },
    nameOf(sae, latent) {
      if (sae.names && sae.names[latent]) return sae.names[latent];
      return null;
    },
    // The class of most of its activation, where that is a fair part of it.
    classOf(sae, latent) {
      const best = sae.classes && sae.classes.best ? sae.classes.best[latent] : -1;
      const share = sae.column.purity ? sae.column.purity[latent] : NaN;
      return best >= 0 && share >= 0.1 ? `${apart(sae.classes.names[best])} ${percent(share)}` : null;
    },
    favourites: (number = app.state.sae) => new Set(stars[number] || []),
    star(latent) {
      const mine = app.favourites();
      if (!mine.delete(latent)) mine.add(latent);
      stars[app.state.sae] = [...mine].sort((a, b) => a - b);
      memory.write("stars", stars);
      app.update(true);
    },
    set(more) {
      Object.assign(app.state, more);
      write();
      app.update();
    },
    open(latent, number = app.state.sae) {
      const other = number !== app.state.sae;
      app.state.latent = latent;
      app.state.sae = number;
      app.state.view = "";
      write();
      if (other) showSae();
      app.update();
      table.reveal(latent);
      tell(`Latent ${latent}`);
    },
    step(by) {
      const next = table.beside(by);
      if (next !== null) app.open(next);
    },
    sortBy(key) {
      app.set({ sort: key, desc: app.state.sort === key ? !app.state.desc : !["latent", "name", "class"].includes(key) });
    },
    link: (latent, number) => `${location.href.split("#")[0]}#${number ? `sae=${number}&` : ""}latent=${latent}`,
    steer(sae, latent, share = 1) {
      const max = sae.column.max ? sae.column.max[latent] : NaN;
      const alpha = Number(((Number.isFinite(max) ? max : 10) * share).toPrecision(3));
      return sae.steer.replace(/LATENT --alpha ALPHA$/, `${latent} --alpha ${alpha}`);
    },
    // A file of the stars, with what the page knows of their latents.
    exportStars() {
      const saes = index.saes.map((sae, number) => ({ name: sae.name, path: sae.path, latents: [...app.favourites(number)].map((latent) => ({
        latent, name: app.nameOf(sae, latent), ...Object.fromEntries(sae.measures.map((m) => [m.key, sae.column[m.key][latent]]).filter(([, value]) => Number.isFinite(value))) })) }));
      app.save("stars.json", { format: "saevlm-fast stars", title: index.title, saes });
    },
    save(name, value) {
      const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
      const link = el("a", { href: url, download: name });
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(url), 1000);
      tell(`Saved ${name}`, true);
    },
    async copy(text, what) {
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        const area = el("textarea", { class: "unseen" });
        area.value = text;
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
      }
      tell(`Copied the ${what}: ${text}`, true);
    },
    update(redraw = false) {
      const { view, latent, sae, pin } = app.state;
      document.getElementById("list").hidden = Boolean(view);
      detail.hidden = Boolean(view);
      overviewRoot.hidden = !view;
      for (const tab of tabs) tab.setAttribute("aria-pressed", String(tab.dataset.view === view));
      if (view) {
        (view === "blind" ? Blind : Overview).show(app, overviewRoot);
        return;
      }
      table.update(app.state);
      const key = `${sae}/${latent}`;
      if (latent === null) {
        main.dataset.shown = main.dataset.asked = "";
        main.replaceChildren(el("p", { class: wrong ? "problem" : "note", text: wrong || "Choose a latent." }));
      }
      else if (redraw || main.dataset.shown !== key) {
        main.dataset.shown = key;
        Latent.show(app, main, sae, latent);
        if (!redraw) detail.scrollTop = 0;
      }
      const [pinSae, pinLatent] = pin ? pin.split(".").map(Number) : [];
      pinned.hidden = !pin;
      detail.classList.toggle("two", Boolean(pin));
      if (pin && pinned.dataset.shown !== pin) {
        pinned.dataset.shown = pin;
        Latent.show(app, pinned, pinSae, pinLatent, { pinned: true });
      }
    },
  };

  // --- the address ---

  function write() {
    const { sae, latent, sort, desc, q, stars: only, view, pin, filters } = app.state;
    wrong = "";
    const parts = [];
    if (view) parts.push(`view=${view}`);
    if (sae) parts.push(`sae=${sae}`);
    if (latent !== null) parts.push(`latent=${latent}`);
    if (sort && (sort !== first.sort || desc !== first.desc)) parts.push(`sort=${encodeURIComponent(sort)}`, `desc=${desc ? 1 : 0}`);
    if (q) parts.push(`q=${encodeURIComponent(q)}`);
    if (only) parts.push("stars=1");
    if (pin) parts.push(`pin=${pin}`);
    for (const f of filters) parts.push(`f=${encodeURIComponent(`${f.key}:${Number.isFinite(f.min) ? f.min : ""}:${Number.isFinite(f.max) ? f.max : ""}`)}`);
    const hash = `#${parts.join("&")}`;
    try { history.replaceState(null, "", hash); } catch { location.hash = hash; }
  }

  let wrong = ""; // what is said of an address that leads nowhere; another latent is not shown in its place

  const bound = (text, unset) => (text === "" || Number.isNaN(Number(text)) ? unset : Number(text));

  function read() {
    const found = new URLSearchParams(location.hash.slice(1));
    const number = Number(found.get("sae") || 0);
    const sae = Number.isInteger(number) && index.saes[number] ? number : 0;
    const latent = Number(found.get("latent"));
    const there = found.has("latent") && sae === number && Number.isInteger(latent) && latent >= 0 && latent < index.saes[sae].dSae;
    wrong = found.has("latent") && !there ? `There is no latent ${apart(found.get("latent"))}${sae === number ? "" : ` of an SAE ${apart(found.get("sae"))}`} in this report.` : "";
    const [pinSae, pinLatent] = /^\d+\.\d+$/.test(found.get("pin") || "") ? found.get("pin").split(".").map(Number) : [];
    const pin = index.saes[pinSae] && pinLatent < index.saes[pinSae].dSae ? `${pinSae}.${pinLatent}` : "";
    const filters = found.getAll("f").map((text) => text.split(":")).filter((parts) => parts.length === 3)
      .map(([key, min, max]) => ({ key, min: bound(min, -Infinity), max: bound(max, Infinity) }))
      .filter((f) => f.key in index.saes[sae].column);
    const sort = found.get("sort");
    const known = sort === "latent" || sort === "name" || sort === "class" || (sort && sort in index.saes[sae].column);
    Object.assign(app.state, start, first, { sae, filters, pin, latent: there ? latent : null, q: found.get("q") || "", stars: found.get("stars") || "",
      view: views.includes(found.get("view")) ? found.get("view") : "" });
    if (known) Object.assign(app.state, { sort, desc: found.get("desc") !== "0" });
  }

  // --- the page's frame ---

  function tell(text, seen = false) {
    status.textContent = text;
    if (!seen) return;
    const note = el("div", { class: "toast", text });
    document.body.append(note);
    setTimeout(() => note.remove(), 2500);
  }

  function theme(next) {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = memory.read("theme") || (dark ? "dark" : "light");
    const value = next ? (now === "dark" ? "light" : "dark") : now;
    if (next) memory.write("theme", value);
    document.documentElement.dataset.theme = value;
    themeButton.textContent = value === "dark" ? "Light" : "Dark";
    themeButton.setAttribute("aria-label", `Use ${value === "dark" ? "light" : "dark"} colours`);
  }

  const status = document.getElementById("status");
  const detail = document.getElementById("detail"), overviewRoot = document.getElementById("overview");
  const main = el("div", { class: "pane" }), pinned = el("div", { class: "pane pinned", hidden: true });
  detail.append(main, pinned);
  const views = ["", "overview", ...(index.control === null ? [] : ["blind"])];
  const titles = { "": "Latents", overview: index.saes.length > 1 ? "Overview of the SAEs" : "Overview", blind: "Blind check" };
  const tabs = views.map((view) => [view, titles[view]]).map(([view, text]) =>
    el("button", { type: "button", class: "tab", "data-view": view, "aria-pressed": "false", text, onclick: () => app.set({ view }) }));
  const choose = el("select", { id: "sae", "aria-label": "SAE", onchange: () => { app.state.latent = null; app.state.sae = Number(choose.value); showSae(); app.set({}); first_latent(); } },
    index.saes.map((sae, i) => el("option", { value: String(i), text: sae.name })));
  const themeButton = el("button", { type: "button", onclick: () => theme(true) });
  const blind = el("button", { type: "button", text: "Hide names", "aria-pressed": "false", onclick: () => {
    const on = document.body.classList.toggle("blind");
    blind.setAttribute("aria-pressed", String(on));
  } });
  const keys = el("button", { type: "button", text: "Keys", onclick: () => {
    const close = el("button", { type: "button", text: "Close", onclick: () => dialog.close() });
    const rows = [["j, k", "next and previous latent of the list"], ["/", "search"], ["o", "overview and back"], ["h", "heat maps on and off"], ["s", "star"], ["arrow keys", "in the list: move"]];
    const dialog = el("dialog", { class: "large", "aria-label": "Keys" }, el("dl", { class: "facts" }, rows.map(([a, b]) => el("div", {}, el("dt", { text: a }), el("dd", { text: b })))), close);
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  } });
  add(document.getElementById("top"), el("h1", { text: index.title }), el("nav", { class: "tabs", "aria-label": "Views" }, tabs),
    index.saes.length > 1 ? choose : null, el("span", { class: "spring" }), blind, keys, themeButton);
  const table = new LatentTable(document.getElementById("list"), app);

  const first = { sort: "latent", desc: false };
  function showSae() {
    const sae = index.saes[app.state.sae];
    choose.value = String(app.state.sae);
    table.show(sae);
    const best = ["max", "ms"].find((key) => sae.column[key]);  // a score's best are latents of two or three images
    if (best) Object.assign(first, { sort: best, desc: true });
    if (!app.state.sort || !(app.state.sort in sae.column || ["latent", "name", "class"].includes(app.state.sort))) Object.assign(app.state, first);
  }

  function first_latent() {
    if (app.state.latent === null && !wrong && table.order.length && !app.state.view) {
      const sae = index.saes[app.state.sae];  // the strongest that has a name: the strongest of all often fire on every image
      const named = sae.names && app.state.sort === first.sort ? table.order.find((latent) => sae.names[latent]) : undefined;
      app.state.latent = named === undefined ? table.order[0] : named;
      app.update();
    }
  }

  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox";
    if (event.key === "Escape" && typing) event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog")) return;
    const list = app.state.view ? {} : {
      j: () => app.step(1), k: () => app.step(-1), "/": () => table.search.focus(),
      s: () => app.state.latent !== null && app.star(app.state.latent),
    };
    const actions = {
      ...list,
      o: () => app.set({ view: app.state.view ? "" : "overview" }),
      h: () => { const box = document.querySelector('input[data-heat="heat"]'); if (box) box.click(); },
    };
    const verdict = app.state.view === "blind" && document.querySelector(`[data-verdict][data-key="${CSS.escape(event.key)}"]`);
    if (verdict) verdict.click();
    if (event.key in actions) {
      event.preventDefault();
      actions[event.key]();
    }
  });
  window.addEventListener("hashchange", () => { read(); showSae(); app.update(); if (app.state.latent !== null) table.reveal(app.state.latent); });

  theme(false);
  read();
  showSae();
  read();
  app.update();
  first_latent();
  if (app.state.latent !== null) table.reveal(app.state.latent);
  document.body.classList.add("ready");
})();
