"use strict";
(() => {
  const make = (tag, kind, text) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const press = (text, does) => {
    const button = make("button", "tempo-tool", text);
    button.type = "button";
    button.addEventListener("click", () => does(button));
    return button;
  };
  const aimed = () => document.getElementById(decodeURIComponent(location.hash.slice(1)));

  // A table whose headings sort it. moved is called before its rows move.
  const sortable = (table, moved) => {
    const body = table.tBodies[0];
    const key = (row, column, numeric) => {
      const cell = row.cells[column], value = cell.dataset.value ?? cell.textContent;
      return numeric ? (value === "" ? NaN : Number(value)) : value;
    };
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(head.textContent ? head.firstChild.textContent : "");
      if (head.firstElementChild) button.textContent = head.firstElementChild.firstChild.data;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        moved();
        const down = head.getAttribute("aria-sort") === "ascending";
        const numeric = head.dataset.sort === "number";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const sign = down ? -1 : 1;
        // rows without a number stay last either way; equal ones keep their order
        const order = (a, b) => {
          const x = key(a, column, numeric), y = key(b, column, numeric);
          if (numeric && (Number.isNaN(x) || Number.isNaN(y))) {
            return Number.isNaN(x) - Number.isNaN(y);
          }
          return sign * (numeric ? x - y : x < y ? -1 : x > y ? 1 : 0);
        };
        body.append(...[...body.rows].sort(order));
      });
    });
  };

  // The prompts behind a claim: a table that is made when it is asked for.
  const kept = document.getElementById("tempo-data");
  const data = kept ? JSON.parse(kept.textContent) : { claims: {} };
  const runOf = (number) => number < 0 ? null
    : data.runs[number] === "" ? []
    : data.runs[number].split("/").map((set) => set.split(" ").map((i) => data.tokens[parseInt(i, 36)]));
  // a list of numbers: its decimals, and the numbers; what has none is null
  const numbersOf = (number) => {
    const [decimals, ...whole] = data.numbers[number];
    return [decimals, whole.map((n) => n === null ? null : n / 10 ** decimals)];
  };
  const said = (value, decimals) => value === null ? "–"
    : decimals > 6 ? value.toExponential(2) : value.toFixed(decimals);
  const sets = (run) => run.map((members) => `[${members.join("/")}]`).join("");
  const promptTable = (claim) => {
    const modes = Object.keys(claim.sets);
    const list = (name) => data.lists[claim.sets[name]];
    const columnsOf = [claim.values, claim.control].map(numbersOf);
    const table = make("table", "tempo-table"), rows = table.createTHead().insertRow();
    const columns = [["Prompt", "text"], ["Category", "text"], ["Value", "number"],
      ["Control", "number"], ...modes.map((mode) => [`Widths, ${mode}`, "number"])];
    for (const [name, kind] of columns) {
      const head = make("th", "", name);
      head.scope = "col";
      head.dataset.sort = kind;
      rows.append(head);
    }
    const body = table.createTBody();
    const close = () => body.querySelectorAll(".tempo-more").forEach((row) => row.remove());
    data.lists[claim.prompts].forEach((number, i) => {
      const [text, category] = data.prompts[number], row = body.insertRow();
      const runs = modes.map((mode) => runOf(list(mode)[i]));
      const cell = (shown, value) => {
        const made = row.insertCell();
        made.append(shown);
        made.dataset.value = value;
        return made;
      };
      const open = (button) => {
        const next = row.nextElementSibling;
        const shows = next && next.classList.contains("tempo-more");
        button.setAttribute("aria-expanded", String(!shows));
        if (shows) return next.remove();
        const more = make("tr", "tempo-more"), wide = more.insertCell();
        wide.colSpan = columns.length;
        if (text.length > 160) wide.append(make("p", "", text)); // the cell shows its begin
        modes.forEach((mode, m) => {
          if (runs[m]) wide.append(make("p", "tempo-sets", `${mode}: ${sets(runs[m])}`));
        });
        row.after(more);
      };
      const any = runs.some(Boolean);
      const name = any ? press(text, open) : make("span", "", text);
      if (any) name.setAttribute("aria-expanded", "false");
      cell(name, text);
      cell(category, category);
      for (const [decimals, values] of columnsOf) {
        cell(said(values[i], decimals), values[i] === null ? "" : values[i]);
      }
      for (const run of runs) {
        const widths = run ? run.map((members) => members.length) : [];
        const total = widths.reduce((sum, width) => sum + width, 0);
        cell(widths.join(" "), run ? total / widths.length : "");
      }
    });
    sortable(table, close);
    return table;
  };
  // Every prompt as a dot behind its mean, strewn as evenly as in the figures.
  const GOLDEN = 0.6180339887;
  for (const drawn of document.querySelectorAll(".tempo-effect[data-claim]")) {
    const { claim: of } = drawn.dataset;
    const claim = data.claims[of === "." ? drawn.closest("tr").id : of];
    if (!claim) continue;
    const [low, high] = drawn.dataset.scale.split(" ").map(Number);
    const { width, height } = drawn.viewBox.baseVal;
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const dots = numbersOf(claim.values)[1].filter((value) => value !== null).map((value, i) => {
      const x = width * (Math.min(Math.max(value, low), high) - low) / (high - low);
      const y = height / 2 + (height / 2 - 2) * (2 * (((i + 1) * GOLDEN) % 1) - 1);
      return `M${Math.round(x)} ${Math.round(y)}h0`;
    });
    path.setAttribute("class", "tempo-dots");
    path.setAttribute("d", dots.join(""));
    drawn.insertBefore(path, drawn.querySelector(".tempo-zero").nextSibling);
  }
  for (const note of document.querySelectorAll(".tempo-scripted")) note.hidden = false;
  const tables = [];
  for (const row of document.querySelectorAll(".tempo-claims tbody tr")) {
    const claim = data.claims[row.id];
    if (!claim) continue;
    const count = numbersOf(claim.values)[1].filter((value) => value !== null).length;
    const toggle = (button) => {
      const shows = row.nextElementSibling && row.nextElementSibling.matches(".tempo-more");
      button.setAttribute("aria-expanded", String(!shows));
      if (shows) return row.nextElementSibling.remove();
      const more = make("tr", "tempo-more"), wide = more.insertCell(), list = make("div", "tempo-list");
      wide.colSpan = row.cells.length;
      list.tabIndex = 0;
      list.setAttribute("role", "region");
      list.setAttribute("aria-label", "Prompts of this claim");
      list.append(promptTable(claim));
      wide.append(list);
      row.after(more);
    };
    const button = press(count === 1 ? "1 prompt" : `${count} prompts, one by one`, toggle);
    button.setAttribute("aria-expanded", "false");
    row.cells[1].append(button);
    tables.push(button);
  }
  const closeAll = () => {
    for (const row of document.querySelectorAll(".tempo-claims > tbody > .tempo-more")) row.remove();
    for (const button of tables) button.setAttribute("aria-expanded", "false");
  };

  for (const block of document.querySelectorAll(".tempo-block")) {
    const table = block.querySelector(".tempo-claims"), rows = [...table.tBodies[0].rows];
    sortable(table, closeAll);
    const filters = block.querySelector(".tempo-filters"), said = filters.querySelector("output");
    const apply = () => {
      closeAll();
      const checked = [...filters.querySelectorAll("input:checked")];
      const shown = new Set(checked.map((box) => box.value));
      for (const row of rows) row.hidden = !shown.has(row.dataset.verdict);
      const visible = rows.filter((row) => !row.hidden).length;
      said.textContent = `${visible} of ${rows.length} claims`;
    };
    filters.hidden = false;
    filters.addEventListener("change", apply);
    apply();
    // a link to a claim shows it, whatever the filters say
    const reveal = () => {
      const target = aimed(), row = target && target.closest(".tempo-claims tr");
      if (row && row.hidden && rows.includes(row)) {
        for (const box of filters.querySelectorAll("input")) box.checked = true;
        apply();
        target.scrollIntoView();
      }
    };
    addEventListener("hashchange", reveal);
    reveal();
  }

  // What is folded unfolds when a link leads to it, or into it.
  const unfold = () => {
    const target = aimed();
    if (!target) return;
    const inner = target.tagName === "SECTION" && target.querySelector(":scope > details");
    for (let fold = inner || target; fold; fold = fold.parentElement) {
      if (fold.tagName === "DETAILS") fold.open = true;
    }
    target.scrollIntoView();
  };
  addEventListener("hashchange", unfold);
  unfold();

  // Every figure as a file, made here: nothing is fetched.
  const save = (blob, name) => {
    const link = make("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const sheet = document.getElementById("tempo-figure-styles").textContent;
  const styles = new Map([...sheet.matchAll(/\.(s\d+)\{([^}]*)\}/g)].map((rule) => rule.slice(1)));
  const standing = (svg) => {
    const copy = svg.cloneNode(true), [, , width, height] = svg.getAttribute("viewBox").split(/[ ,]+/);
    copy.removeAttribute("style");
    for (const shape of copy.querySelectorAll("[class]")) { // a file has no stylesheet
      if (!styles.has(shape.getAttribute("class"))) continue;
      shape.setAttribute("style", styles.get(shape.getAttribute("class")));
      shape.removeAttribute("class");
    }
    copy.removeAttribute("aria-labelledby");
    copy.setAttribute("aria-label", svg.closest("figure").querySelector("details p").textContent);
    copy.setAttribute("color", "#222");
    const paper = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of [["width", width], ["height", height], ["fill", "#fff"]]) {
      paper.setAttribute(name, value);
    }
    copy.prepend(paper);
    return new XMLSerializer().serializeToString(copy);
  };
  const raster = (svg, name) => {
    const image = new Image(), scale = 300 / 96;
    image.addEventListener("load", () => {
      const canvas = make("canvas");
      canvas.width = Math.round(Number(svg.getAttribute("width")) * scale);
      canvas.height = Math.round(Number(svg.getAttribute("height")) * scale);
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, `${name}.png`));
    });
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standing(svg))}`;
  };
  for (const figure of document.querySelectorAll(".tempo-figure")) {
    const svg = figure.querySelector("svg"), name = figure.dataset.name, row = make("div", "tempo-tools");
    row.append(
      press("SVG", () => save(new Blob([standing(svg)], { type: "image/svg+xml" }), `${name}.svg`)),
      press("PNG", () => raster(svg, name)),
    );
    if (figure.dataset.csv) {
      const table = new Blob([figure.dataset.csv], { type: "text/csv" });
      row.append(press("CSV", () => save(table, `${name}.csv`)));
    }
    for (const button of row.children) {
      button.setAttribute("aria-label", `${button.textContent} of this figure`);
    }
    figure.append(row);
  }

  // The contents say where the reader is.
  const links = new Map();
  for (const link of document.querySelectorAll(".tempo-toc a")) {
    const target = document.getElementById(link.hash.slice(1));
    if (target) links.set(target, link);
  }
  const mark = () => {
    let last = null;
    for (const [target, link] of links) {
      link.removeAttribute("aria-current");
      if (target.getBoundingClientRect().top < innerHeight / 3) last = link;
    }
    if (last) last.setAttribute("aria-current", "true");
  };
  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; mark(); });
  }, { passive: true });
})();
