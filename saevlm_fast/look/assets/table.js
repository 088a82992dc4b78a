"use strict";
// The list of latents: sorted, filtered, searched; only the rows on the screen are there.
class LatentTable {
  constructor(root, app) {
    this.root = root;
    this.app = app;
    this.rowHeight = 30;
    this.order = new Uint32Array(0);
    this.build();
  }

  build() {
    this.count = el("p", { class: "count", role: "status" });
    this.head = el("div", { role: "row", class: "row head", "aria-rowindex": "1" });
    this.body = el("div", { role: "rowgroup", class: "rows" });
    this.grid = el("div", { role: "grid", class: "grid", tabindex: "0", "aria-label": "Latents: arrow keys move, Enter opens" },
      el("div", { role: "rowgroup", class: "headgroup" }, this.head), this.body);
    this.grid.addEventListener("scroll", () => this.draw(), { passive: true });
    this.grid.addEventListener("keydown", (event) => this.key(event));
    this.filters = el("div", { class: "filters" });
    this.search = el("input", { type: "search", id: "search", placeholder: "Search", title: "Name, word, class or number", "aria-label": "Search names, words, classes and numbers",
      oninput: () => this.app.set({ q: this.search.value }) });
    const more = el("button", { type: "button", class: "quiet", text: "+ Filter", onclick: () => this.addFilter() });
    this.stars = el("input", { type: "checkbox", id: "stars", onchange: () => this.app.set({ stars: this.stars.checked ? "1" : "" }) });
    const tools = el("div", { class: "tools" }, this.search, more, el("label", { class: "check" }, this.stars, "starred"),
      el("button", { type: "button", class: "quiet", text: "Export stars", title: "A JSON file of the starred latents", onclick: () => this.app.exportStars() }));
    this.sort = el("select", { "aria-label": "Sort by", onchange: () => this.app.sortBy(this.sort.value) });
    const about = el("div", { class: "about" }, this.count, el("label", { class: "pick" }, "Sort by", this.sort));
    this.root.append(tools, this.filters, about, this.grid);
    new ResizeObserver(() => this.draw()).observe(this.grid);
  }

  show(sae) {
    this.sae = sae;
    const labels = new Map(sae.measures.map((m) => [m.key, m.label]));
    this.columns = ["latent", ...(sae.names ? ["name"] : []), ...(sae.classes ? ["class"] : []), ...sae.measures.map((m) => m.key)];
    const wanted = ["latent", "name", "class", "ms", "density", "max", "purity", "uniqueness", "lca_depth", "name_score", "decoder_cosine", "jaccard"];
    const seen = this.columns.filter((key) => wanted.includes(key));
    this.shown = seen.concat(this.columns.filter((key) => !wanted.includes(key))).slice(0, 7);
    this.shown.sort((a, b) => (wanted.indexOf(a) + 99) % 99 - ((wanted.indexOf(b) + 99) % 99));
    this.usual = this.shown;
    this.sort.replaceChildren(...this.columns.map((key) => el("option", { value: key, text: labels.get(key) || key })));
    this.drawHead();
  }

  // The usual columns, and that by which the list is sorted.
  drawHead() {
    const sae = this.sae, sort = this.app.state.sort, labels = new Map(sae.measures.map((m) => [m.key, m.label]));
    const hidden = this.columns.includes(sort) && !this.usual.includes(sort);
    this.shown = hidden ? [...this.usual.slice(0, 2), sort, ...this.usual.slice(2)] : this.usual;
    this.grid.style.setProperty("--columns", this.shown.map((key) => (key === "name" || key === "class" ? "minmax(8rem, 1fr)" : key === "latent" ? "4.2rem" : (labels.get(key) || "").length > 8 ? "6.6rem" : "5rem")).join(" "));
    this.head.replaceChildren(...this.shown.map((key) => {
      const measure = sae.measures.find((m) => m.key === key);
      const cell = el("div", { role: "columnheader", "data-key": key }, el("button", {
        type: "button", title: measure ? measure.help : "", text: measure ? measure.label : key, onclick: () => this.app.sortBy(key),
      }));
      return cell;
    }));
    this.grid.setAttribute("aria-colcount", this.shown.length);
  }

  // Applies search, filters and sort of the page's state.
  update(state) {
    const sae = this.sae, n = sae.dSae;
    this.stars.checked = state.stars === "1";
    if (document.activeElement !== this.search) this.search.value = state.q || "";
    this.drawFilters(state.filters);
    const tests = state.filters.map((f) => [sae.column[f.key], f.min, f.max]).filter(([values]) => values);
    const words = (state.q || "").trim().toLowerCase();
    const starred = state.stars === "1" ? this.app.favourites() : null;
    const kept = [];
    for (let i = 0; i < n; i++) {
      if (tests.some(([values, min, max]) => !(values[i] >= min && values[i] <= max))) continue;
      if (words && !this.matches(i, words)) continue;
      if (starred && !starred.has(i)) continue;
      kept.push(i);
    }
    if (!this.usual.includes(state.sort) || this.shown !== this.usual) this.drawHead();
    this.sort.value = state.sort;
    const values = sae.column[state.sort];
    if (state.sort === "name" || state.sort === "class") {
      const of = state.sort === "name" ? this.app.nameOf : this.app.classOf;
      const names = kept.map((i) => [of(sae, i) || "\uffff", i]);
      names.sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] - b[1]) * (state.desc ? -1 : 1));
      this.order = names.map(([, i]) => i);
    } else {
      const sign = state.desc ? -1 : 1;
      const key = values ? (i) => values[i] : (i) => i;
      this.order = kept.sort((a, b) => {
        const x = key(a), y = key(b);
        if (Number.isNaN(x)) return Number.isNaN(y) ? a - b : 1; // what is not known comes last
        if (Number.isNaN(y)) return -1;
        return sign * (x - y) || a - b;
      });
    }
    for (const cell of this.head.children) {
      const mine = cell.dataset.key === state.sort;
      cell.setAttribute("aria-sort", mine ? (state.desc ? "descending" : "ascending") : "none");
    }
    this.count.textContent = `${this.order.length.toLocaleString("en")} of ${n.toLocaleString("en")} latents`;
    this.grid.setAttribute("aria-rowcount", this.order.length + 1);
    this.body.style.height = `${this.order.length * this.rowHeight}px`;
    this.draw();
  }

  matches(i, words) {
    if (String(i) === words.replace(/^#/, "")) return true;
    const sae = this.sae;
    const best = sae.classes && sae.classes.best && sae.classes.best[i] >= 0 ? sae.classes.names[sae.classes.best[i]] : "";
    return [sae.names && sae.names[i], sae.words && sae.words[i], best].some((text) => text && text.toLowerCase().includes(words));
  }

  draw() {
    if (!this.sae) return;
    const top = this.grid.scrollTop, height = this.grid.clientHeight || 600;
    const first = Math.max(0, Math.floor(top / this.rowHeight) - 8);
    const last = Math.min(this.order.length, Math.ceil((top + height) / this.rowHeight) + 8);
    const chosen = this.app.state.latent;
    this.body.replaceChildren();
    for (let at = first; at < last; at++) {
      const i = this.order[at];
      const row = el("div", { role: "row", class: i === chosen ? "row chosen" : "row", "aria-rowindex": String(at + 2), id: `row-${i}`,
        "aria-selected": i === chosen ? "true" : "false", onclick: () => this.app.open(i) },
        this.shown.map((key) => el("div", { role: "gridcell", class: key === "name" || key === "class" ? "name" : "number", text: this.cell(key, i) })));
      row.style.top = `${at * this.rowHeight}px`;
      this.body.append(row);
    }
    if (document.getElementById(`row-${chosen}`)) this.grid.setAttribute("aria-activedescendant", `row-${chosen}`);
    else this.grid.removeAttribute("aria-activedescendant");
  }

  cell(key, i) {
    if (key === "latent") return (this.app.favourites().has(i) ? "★ " : "") + i;
    if (key === "name") return this.app.nameOf(this.sae, i) || "–";
    if (key === "class") return this.app.classOf(this.sae, i) || "–";
    return digits(this.sae.column[key][i]);
  }

  // The latent before or after the chosen one, as the list stands.
  beside(step) {
    const at = this.order.indexOf(this.app.state.latent);
    if (!this.order.length) return null;
    return this.order[at < 0 ? 0 : Math.min(Math.max(at + step, 0), this.order.length - 1)];
  }

  reveal(i) {
    const at = this.order.indexOf(i);
    if (at < 0) return;
    const y = at * this.rowHeight, height = this.grid.clientHeight - 2 * this.rowHeight;
    if (y < this.grid.scrollTop || y > this.grid.scrollTop + height) this.grid.scrollTop = Math.max(0, y - height / 2);
    this.draw();
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.grid.clientHeight / this.rowHeight) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || event.target !== this.grid) return;
    event.preventDefault();
    const step = steps[event.key];
    const next = step === -Infinity ? this.order[0] : step === Infinity ? this.order[this.order.length - 1] : this.beside(step);
    if (next !== null && next !== undefined) this.app.open(next);
  }

  addFilter() {
    const filters = this.app.state.filters.concat([{ key: this.sae.measures[0].key, min: -Infinity, max: Infinity }]);
    this.app.set({ filters });
    this.filters.querySelector(".filter:last-child select").focus();
  }

  drawFilters(filters) {
    if (this.filters.contains(document.activeElement) && this.filters.children.length === filters.length) return;
    this.filters.replaceChildren(...filters.map((filter, number) => {
      const change = (more) => this.app.set({ filters: this.app.state.filters.map((f, i) => (i === number ? { ...f, ...more } : f)) });
      const bound = (name, unset) => el("input", { type: "number", step: "any", class: "bound", "aria-label": `${name} of ${filter.key}`, placeholder: name,
        value: Number.isFinite(filter[name]) ? String(filter[name]) : "",
        oninput: (event) => change({ [name]: event.target.value === "" ? unset : Number(event.target.value) }) });
      return el("div", { class: "filter" },
        el("select", { "aria-label": "Measure of the filter", onchange: (event) => change({ key: event.target.value }) },
          this.sae.measures.map((m) => el("option", { value: m.key, text: m.label, selected: m.key === filter.key }))),
        bound("min", -Infinity), "to", bound("max", Infinity),
        el("button", { type: "button", class: "quiet", "aria-label": `Remove the filter of ${filter.key}`, text: "×",
          onclick: () => this.app.set({ filters: this.app.state.filters.filter((_, i) => i !== number) }) }));
    }));
  }
}
