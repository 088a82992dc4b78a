"use strict";
// Pictures: cut from sheets, with the latent's own heat map over the part that the tower saw.
const Pictures = (() => {
  const sheets = new Map(); // number -> promise of an Image; so many are kept decoded
  const KEPT = 24;
  const look = { heat: true, smooth: false, own: false, edge: false };
  const EDGE = 0.5; // of a picture's largest patch: what a contour goes around
  let seen = null;

  function index() {
    return SAEVLM.get("index").images;
  }

  function sheet(number) {
    let found = sheets.get(number);
    if (!found) {
      found = new Promise((resolve) => {
        const image = new Image();
        image.decoding = "async";
        image.onload = () => resolve(image);
        image.onerror = () => resolve(null);
        const name = `sheet/${number}`;
        image.src = SAEVLM.has(name) ? SAEVLM.get(name) : `sprites/sheet-${String(number).padStart(5, "0")}.webp`;
      });
    }
    sheets.delete(number);
    sheets.set(number, found);
    if (sheets.size > KEPT) sheets.delete(sheets.keys().next().value);
    return found;
  }

  function tile(number) {
    const each = SAEVLM.get("index").tilesAChunk;
    return SAEVLM.load(`tiles/${Math.floor(number / each)}`).then((tiles) => {
      const [name, label, width, height, region] = tiles[number % each];
      return { name, label, width, height, region: region || [0, 0, 1, 1] };
    });
  }

  // The map as a small canvas, one pixel a patch.
  function heatCanvas(text, grid) {
    const [rows, columns] = grid;
    const canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = rows;
    const pen = canvas.getContext("2d");
    const pixels = pen.createImageData(columns, rows);
    const packed = SAEVLM.bytes(text);
    let most = 255;
    if (look.own) {
      most = 1;
      for (let i = 2; i < packed.length; i += 3) most = Math.max(most, packed[i]);
    }
    for (let i = 0; i < packed.length; i += 3) {
      const patch = packed[i] + 256 * packed[i + 1], share = Math.min(packed[i + 2] / most, 1);
      const [r, g, b] = viridis(share);
      pixels.data.set([r, g, b, Math.round(255 * 0.75 * Math.sqrt(share))], 4 * patch);
    }
    pen.putImageData(pixels, 0, 0);
    return canvas;
  }

  // A line around the patches at half of the picture's largest and above: a shape without colours.
  function contour(pen, text, [rows, columns], [x, y, width, height], ratio) {
    const packed = SAEVLM.bytes(text), value = new Uint8Array(rows * columns);
    for (let i = 0; i < packed.length; i += 3) value[packed[i] + 256 * packed[i + 1]] = packed[i + 2];
    const least = Math.max(1, EDGE * value.reduce((a, b) => Math.max(a, b), 0));
    const inside = (row, column) => row >= 0 && column >= 0 && row < rows && column < columns && value[row * columns + column] >= least;
    const sx = width / columns, sy = height / rows;
    pen.beginPath();
    for (let row = 0; row <= rows; row++) {
      for (let column = 0; column <= columns; column++) {
        const here = inside(row, column), px = x + column * sx, py = y + row * sy;
        if (here !== inside(row, column - 1)) { pen.moveTo(px, py); pen.lineTo(px, py + sy); }
        if (here !== inside(row - 1, column)) { pen.moveTo(px, py); pen.lineTo(px + sx, py); }
      }
    }
    for (const [colour, size] of [["#000000", 4], ["#ffffff", 2]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = size * ratio;
      pen.stroke();
    }
  }

  async function draw(canvas, [number, , heat], grid, side) {
    const about = await tile(number);
    const image = about.width ? await sheet(Math.floor(number / index().aSheet)) : null; // a sheet of missing ones is none
    const ratio = window.devicePixelRatio || 1;
    const aspect = about.width && about.height ? about.width / about.height : 1;
    const width = aspect >= 1 ? side : side * aspect, height = aspect >= 1 ? side / aspect : side;
    canvas.width = Math.max(1, Math.round(width * ratio));
    canvas.height = Math.max(1, Math.round(height * ratio));
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    if (!image || !about.width) {
      pen.fillStyle = "#8a949e";
      pen.fillRect(0, 0, canvas.width, canvas.height);
      pen.strokeStyle = "#5f6a75";
      pen.lineWidth = 2 * ratio;
      pen.beginPath();
      pen.moveTo(0, 0);
      pen.lineTo(canvas.width, canvas.height);
      pen.moveTo(0, canvas.height);
      pen.lineTo(canvas.width, 0);
      pen.stroke();
      canvas.dataset.missing = "1";
    } else {
      const { across, side: cell, aSheet } = index();
      const at = number % aSheet;
      pen.imageSmoothingQuality = "high";
      pen.imageSmoothingEnabled = canvas.width < 3 * about.width || about.width > 64;
      pen.drawImage(image, (at % across) * cell, Math.floor(at / across) * cell, about.width, about.height, 0, 0, canvas.width, canvas.height);
    }
    if (heat !== undefined && grid) {
      const [x0, y0, x1, y1] = about.region;
      const box = [x0 * canvas.width, y0 * canvas.height, (x1 - x0) * canvas.width, (y1 - y0) * canvas.height];
      pen.imageSmoothingEnabled = look.smooth;
      if (look.heat) pen.drawImage(heatCanvas(heat, grid), ...box);
      if (look.edge) contour(pen, heat, grid, box, ratio);
    }
    canvas.dataset.image = about.name;
    return about;
  }

  // Drawn once it is near the screen.
  function whenSeen(node, then) {
    if (!seen) {
      seen = new IntersectionObserver((entries) => {
        for (const entry of entries) {
          if (!entry.isIntersecting) continue;
          seen.unobserve(entry.target);
          entry.target.drawNow();
        }
      }, { rootMargin: "300px" });
    }
    node.drawNow = then;
    seen.observe(node);
  }

  // A map without a mark: it fires on CLS or a register alone.
  const elsewhere = (picture, grid) => (grid && picture[2] === "" ? " (no patch)" : "");

  function said(about, picture, latent) {
    const act = picture[1] === null || picture[1] === undefined ? "silent" : `activation ${digits(picture[1])}`;
    const name = apart(about.name), label = about.label ? `, ${apart(about.label)}` : "";
    const missing = about.width ? "" : ", missing";
    if (latent === null) return `Image ${name}${label}${missing}`;
    return `Image ${name}${label}, ${act} of latent ${latent}${missing}`;
  }

  // A picture with its activation below; a button that enlarges it.
  function figure(picture, { grid, latent, side = 104, note = null }) {
    const canvas = el("canvas", { width: side, height: side, "aria-hidden": "true" });
    canvas.style.width = canvas.style.height = `${side}px`;
    const button = el("button", { class: "picture", type: "button", "aria-label": "Image", onclick: () => enlarge(picture, grid, latent) }, canvas);
    button.style.width = `${side}px`;
    button.style.height = `${side}px`;
    const caption = el("span", { class: "act", text: note || (picture[1] === undefined ? "" : strength(picture[1]) + elsewhere(picture, grid)) });
    whenSeen(button, () => draw(canvas, picture, grid, side).then((about) => {
      button.setAttribute("aria-label", said(about, picture, latent));
      button.title = [about.name, about.label].filter(Boolean).map(apart).join("\n");
    }));
    button.redraw = () => draw(canvas, picture, grid, side);
    return el("span", { class: "figure" }, button, caption);
  }

  function enlarge(picture, grid, latent) {
    const canvas = el("canvas", { role: "img", "aria-label": "Image" });
    const words = el("p", { text: "" });
    const close = el("button", { type: "button", text: "Close", onclick: () => dialog.close() });
    const dialog = el("dialog", { class: "large", "aria-label": "The image, enlarged" }, canvas, words, close);
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    const side = Math.min(512, window.innerWidth - 64, window.innerHeight - 160);
    draw(canvas, picture, grid, side).then((about) => {
      canvas.setAttribute("aria-label", said(about, picture, latent));
      words.textContent = said(about, picture, latent);
    });
    dialog.showModal();
  }

  function redrawAll(root) {
    root.querySelectorAll("button.picture").forEach((button) => button.redraw && button.redraw());
  }

  return { figure, redrawAll, look, tile };
})();
