"use strict";
(() => {
  const SQUARES = Float64Array.from({ length: 256 }, (_, level) => (level / 255) ** 2);
  const MOST_ROWS = 6; // of a list of tokens
  const PARTS = ["sets before", "siblings", "itself", "first token", "rest of the prompt"];

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const bdi = (text) => element("bdi", { textContent: text });
  const share = (x) => {
    if (x === null || Number.isNaN(x)) return "–";
    const percent = 100 * x;
    if (percent === 0 || percent >= 9.95) return `${Math.round(percent)} %`;
    return percent < 0.01 ? "<0.01 %" : `${Number(percent.toPrecision(2))} %`;
  };
  const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const sum = (values) => values.reduce((a, b) => a + b, 0);

  /** What the page holds of one lattice, as questions that can be asked of it. */
  class Run {
    constructor(data, index) {
      this.data = data;
      this.name = data.names[index];
      this.links = data.links[index];
      this.held = data.attention[index];
      this.lens = data.lens[index];
      this.unpacked = [];
    }
    weights(k) {
      return this.unpacked[k] ??= bytes(this.held.steps[k]);
    }
    /** What member i of set k gives to each slot, by one layer and head or their mean. */
    attention(k, i, layer, head) {
      if (!this.held) return null;
      const { layers, heads } = this.held, all = this.weights(k);
      const { slots } = this.data.sets[k], width = slots.length;
      const size = slots[width - 1] + 1, found = new Float64Array(size);
      const range = (chosen, count) =>
        chosen < 0 || count === 1 ? [...Array(count).keys()] : [chosen];
      const ls = range(layer, layers), hs = range(head, heads);
      for (const l of ls) {
        for (const h of hs) {
          const from = ((l * heads + h) * width + i) * size;
          for (let j = 0; j < size; j++) found[j] += SQUARES[all[from + j]];
        }
      }
      return found.map((x) => x / (ls.length * hs.length));
    }
    /** How much of these weights goes to each part of the context, in the order of PARTS. */
    parts(weights, k, i) {
      const { slots } = this.data.sets[k], { prompt } = this.data;
      const found = PARTS.map(() => 0);
      weights.forEach((weight, slot) => {
        const part = slot === slots[i] ? 2 : slot >= slots[0] ? 1 : slot >= prompt ? 0
          : slot === 0 ? 3 : 4;
        found[part] += weight;
      });
      return found;
    }
    /** The part's share of what member i of set k gives, for each layer and head. */
    map(k, i, part) {
      const { layers, heads } = this.held;
      return Array.from({ length: layers * heads }, (_, at) => {
        const weights = this.attention(k, i, Math.floor(at / heads), at % heads);
        return this.parts(weights, k, i)[part];
      });
    }
    /** The probability that each member of earlier sets came before member i of set k. */
    posterior(k, i) {
      const found = new Map(), { sets } = this.data;
      let after = sets[k].slots.map((_, u) => Number(u === i));
      for (let j = k - 1; j >= 0; j--) {
        const link = this.links[j];
        if (!link) break;
        after = link.map((row) => sum(row.map((p, u) => p * after[u])));
        after.forEach((p, h) => found.set(sets[j].slots[h], p));
      }
      return found;
    }
    /** The member of each set on the way back from member i of set k; null if not known. */
    back(k, i) {
      const members = [i];
      for (let j = k - 1; j >= 0; j--) {
        if (!this.links[j]) return null;
        const column = this.links[j].map((row) => row[members[0]]);
        members.unshift(column.indexOf(Math.max(...column)));
      }
      return members;
    }
  }

  const setUp = (group) => {
    const find = (selector) => group.querySelector(selector);
    const data = JSON.parse(find("script[type='application/json']").textContent);
    const runs = data.names.map((_, index) => new Run(data, index));
    const letters = runs.map((_, r) => (runs.length > 1 ? "ABCDEFGH"[r % 8] : ""));
    const chips = [...group.querySelectorAll(".tempo-chip")];
    const members = data.sets.map(() => []);
    for (const chip of chips) {
      if (chip.dataset.k) members[chip.dataset.k][chip.dataset.i] = chip;
    }
    const panel = find(".tempo-panel"), said = find(".tempo-said"), legend = find(".tempo-shown");
    const untouched = legend.textContent;
    const paths = [...group.querySelectorAll(".tempo-path")];
    const hasAttention = runs.some((run) => run.held);
    let held = null, now = null, numbers = hasAttention ? "attention" : "posterior";
    let layer = -1, head = -1, part = 0;

    // --- what stands on the chips
    const put = (chip, values) => {
      [...chip.querySelectorAll(".tempo-n")].forEach((row, r) => {
        const [bar, text] = values[r];
        row.style.setProperty("--v", Math.min(1, bar));
        row.lastChild.textContent = text;
        row.classList.toggle("tempo-none", text === "\u00a0");
      });
    };
    for (const chip of chips) {
      for (const [r, row] of [...chip.querySelectorAll(".tempo-n")].entries()) {
        if (row.firstChild) continue;
        row.append(...(letters[r] ? [element("i", { textContent: letters[r] })] : []),
          element("b", { textContent: "\u00a0" }));
        row.classList.add("tempo-none");
      }
    }
    const resting = new Map(chips.map((chip) => [chip, [...chip.querySelectorAll(".tempo-n")].map(
      (row) => [Number(row.style.getPropertyValue("--v")), row.lastChild.textContent])]));

    const rest = () => {
      for (const chip of chips) {
        put(chip, resting.get(chip));
        chip.classList.remove("tempo-later", "tempo-now", "tempo-traced");
      }
      legend.textContent = untouched;
    };
    const which = () => {
      const of = (name, chosen) => (chosen < 0 ? `mean of all ${name}s` : `${name} ${chosen}`);
      return `${of("layer", layer)}, ${of("head", head)}`;
    };
    const mark = ([k, i]) => {
      const slot = data.sets[k].slots[i], text = `“${data.slots[slot]}”`;
      const values = runs.map((run) => {
        if (numbers === "posterior") return run.posterior(k, i);
        const weights = run.attention(k, i, layer, head);
        return weights && new Map(weights.entries());
      });
      // Most of the attention often goes to the first token, which would dwarf the rest.
      const largest = Math.max(1e-9, ...values.flatMap((found) =>
        (found ? [...found].filter(([at]) => at > 0).map(([, x]) => x) : [])));
      for (const chip of chips) {
        const at = Number(chip.dataset.slot);
        if (numbers !== "probability") {
          put(chip, values.map((found) => {
            const value = found?.get(at);
            if (value === undefined) return [0, "\u00a0"];
            return [numbers === "attention" ? value / largest : value, share(value)];
          }));
        } else {
          put(chip, resting.get(chip));
        }
        chip.classList.toggle("tempo-later", at > data.sets[k].slots.at(-1));
        chip.classList.toggle("tempo-now", at === slot);
      }
      trace(runs[0].back(k, i));
      legend.textContent = {
        attention: `Numbers: attention that ${text} in set ${k} gives to each token `
          + `(${which()}). Bars: relative to the largest but the first token's.`,
        posterior: `Numbers: probability that each earlier token came before ${text} in set ${k}.`,
        probability: untouched,
      }[numbers] + " Dashed: its most probable path.";
    };
    const trace = (path) => {
      for (const chip of members.flat()) chip.classList.remove("tempo-traced");
      (path || []).forEach((i, k) => members[k][i].classList.add("tempo-traced"));
    };

    // --- the panel: controls that stay, and lists that are made anew
    const choice = (name, options, change) => {
      const select = element("select", { ariaLabel: name }, ...options.map(([value, text]) =>
        element("option", { value, textContent: text })));
      select.addEventListener("change", () => { change(select.value); show(now); });
      return [element("label", {}, `${name} `, select), select];
    };
    const range = (count) => [[-1, "mean"], ...Array.from({ length: count }, (_, n) => [n, n])];
    const most = (name) => Math.max(1, ...runs.map((run) => run.held?.[name] ?? 1));
    const kinds = [
      ...(hasAttention ? [["attention", "attention"]] : []),
      ["posterior", "posterior"], ["probability", "probability"],
    ];
    const [numbersLabel] = choice("Numbers on the tokens", kinds, (v) => { numbers = v; });
    const [layerLabel, layerSelect] =
      choice("Layer", range(most("layers")), (v) => { layer = Number(v); });
    const [headLabel, headSelect] =
      choice("Head", range(most("heads")), (v) => { head = Number(v); });
    const [partLabel] = choice("Map of", PARTS.map((name, n) => [n, name]),
      (v) => { part = Number(v); });
    const title = element("h2"), where = element("p", { className: "tempo-note" });
    const attends = element("div"), maps = element("div", { className: "tempo-maps" });
    const next = element("div"), before = element("div"), layers = element("div");
    const note = (text) => element("p", { className: "tempo-note", textContent: text });
    const kept = [...new Set(data.kept.filter(Boolean))].map((text) => note(`Attention is ${text}.`));
    const card = (name, ...children) =>
      element("section", {}, element("h3", { textContent: name }), ...children);
    const hint = note("Point at a token of a set, tap it, or focus it and use the arrow keys. Here "
      + "stands then whom it attends to, by layer and head, what it predicts next, and which member "
      + "of the set before it came after.");
    const details = element("div", { hidden: true }, title, where,
      card("Attends to",
        ...(hasAttention
          ? [element("div", { className: "tempo-controls" }, layerLabel, headLabel), attends,
            element("div", { className: "tempo-controls" }, partLabel,
              note("layers →, heads ↓")), maps, ...kept]
          : kept.length ? kept : [note("Not captured. Generate with capture=\"attention\".")])),
      card("Predicts next", next),
      card("Came from", before),
      card("Layer by layer", layers));
    find(".tempo-reading").append(numbersLabel);
    panel.replaceChildren(hint, details);
    panel.hidden = false;

    /** Rows of a label, a number for each run, an aside, and what a full bar stands for. */
    const table = (rows, caption) => {
      const most = Math.max(1e-9, ...rows.flatMap(([, values]) => values.map((x) => x ?? 0)));
      const heads = letters[0]
        ? [element("thead", {}, element("tr", {}, element("th", { textContent: caption }),
          ...letters.map((letter, r) => element("th", { scope: "col", title: runs[r].name,
            textContent: `${letter} ${runs[r].name}` }))))]
        : [];
      const body = rows.map(([label, values, aside, largest = most]) => element("tr", {},
        element("th", { scope: "row" }, bdi(label),
          ...(aside ? [" ", element("small", { textContent: aside })] : [])),
        ...values.map((value, r) => {
          const cell = element("td", { className: `tempo-n tempo-run-${r % 3}`,
            textContent: share(value) });
          cell.style.setProperty("--v", Math.min(1, (value || 0) / largest));
          return cell;
        })));
      return element("table", { className: "tempo-bars", ariaLabel: caption }, ...heads,
        element("tbody", {}, ...body));
    };
    const place = (slot) => {
      if (slot < data.prompt) return `prompt ${slot}`;
      return `set ${data.sets.findIndex((set) => set.slots.includes(slot))}`;
    };
    /** The most of several runs' numbers by slot, as rows of a table. */
    const ranked = (values) => {
      const slots = new Set(values.flatMap((found) => (found ? [...found.keys()] : [])));
      const rows = [...slots].map((slot) => [slot, values.map((found) => found?.get(slot) ?? null)]);
      const top = ([, xs]) => Math.max(...xs.map((x) => x ?? 0));
      return rows.sort((a, b) => top(b) - top(a)).slice(0, MOST_ROWS);
    };
    const showAttention = (k, i) => {
      const weights = runs.map((run) => run.attention(k, i, layer, head));
      const parts = weights.map((found, r) => found && runs[r].parts(found, k, i));
      const whole = PARTS.map((name, n) => [name, parts.map((found) => found && found[n]), "", 1]);
      const slots = ranked(weights.map((found) => found && new Map(found.entries())));
      const rows = slots.map(([slot, values]) => [data.slots[slot], values, place(slot)]);
      attends.replaceChildren(table(whole, "part"), table(rows, "token"));
      const found = runs.map((run) => run.held && run.map(k, i, part));
      const largest = Math.max(1e-9, ...found.flatMap((map) => map || []));
      maps.replaceChildren();
      found.forEach((map, r) => { if (map) draw(map, runs[r], r, largest); });
    };
    const draw = (map, run, r, largest) => {
      const { layers, heads } = run.held;
      const canvas = element("canvas", { width: layers, height: heads });
      canvas.style.height = `${Math.max(24, Math.min(140, 10 * heads))}px`;
      const peak = map.indexOf(Math.max(...map));
      const at = (n) => `layer ${Math.floor(n / heads)}, head ${n % heads}: ${share(map[n])}`;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${run.name}: attention to ${PARTS[part]} by layer and head. `
        + `Most in ${at(peak)}. Choose with Layer and Head above.`);
      const cell = (event) => {
        const box = canvas.getBoundingClientRect();
        const along = (x, size, count) => Math.max(0, Math.min(count - 1, Math.floor(x / size * count)));
        return along(event.clientX - box.left, box.width, layers) * heads
          + along(event.clientY - box.top, box.height, heads);
      };
      canvas.addEventListener("pointermove", (event) => { canvas.title = at(cell(event)); });
      canvas.addEventListener("click", (event) => {
        const chosen = cell(event), [l, h] = [Math.floor(chosen / heads), chosen % heads];
        [layer, head] = l === layer && h === head ? [-1, -1] : [l, h];
        [layerSelect.value, headSelect.value] = [layer, head];
        show(now);
      });
      const frame = element("div", { className: `tempo-map tempo-run-${r % 3}` }, canvas);
      if (layer >= 0 || head >= 0) {
        const box = element("span", { className: "tempo-mark" });
        const [l, h] = [Math.max(0, layer), Math.max(0, head)];
        Object.assign(box.style, {
          left: `${100 * l / layers}%`, width: `${100 * (layer < 0 ? 1 : 1 / layers)}%`,
          top: `${100 * h / heads}%`, height: `${100 * (head < 0 ? 1 : 1 / heads)}%`,
        });
        frame.append(box);
      }
      const letter = letters[r] ? `${letters[r]}: ` : "";
      const most = map[peak] > 0 ? `most in ${at(peak)}` : "0 % in every head";
      maps.append(element("figure", {}, frame,
        element("figcaption", { textContent: letter + most })));
      const hue = getComputedStyle(frame).color.match(/\d+/g).slice(0, 3);
      const image = new ImageData(layers, heads);
      map.forEach((value, n) => {
        const pixel = 4 * ((n % heads) * layers + Math.floor(n / heads));
        image.data.set([...hue, 255 * Math.sqrt(value / largest)], pixel);
      });
      canvas.getContext("2d").putImageData(image, 0, 0);
    };
    const showNext = (k, i) => {
      if (!data.next) {
        next.replaceChildren(note("Not captured. Generate with capture=\"logits\"."));
        return;
      }
      const { top, tv } = data.next[k][i];
      const rows = top.slice(0, MOST_ROWS).map(([text, values]) => [text, values, ""]);
      next.replaceChildren(table(rows, "token"), ...(tv === null ? [] : [
        note(`Total variation between ${runs[0].name} and ${runs.at(-1).name}: ${share(tv)}.`)]));
    };
    /** What would be predicted from the residual before each layer, in each run. */
    const showLayers = (k, i) => {
      const found = runs.map((run) => (Array.isArray(run.lens) ? run.lens[k][i] : null));
      const known = found.find(Boolean), why = runs.find((run) => run.lens)?.lens;
      if (!known) {
        layers.replaceChildren(note(why || "Not known: it takes capture=\"residual\" and the model."));
        return;
      }
      const rows = [];
      known.forEach((_, layer) => {
        const texts = found.map((of) => of && of[layer][0]);
        const last = rows.at(-1);
        const name = layer === known.length - 1 ? "output" : String(layer);
        if (last && name !== "output" && texts.every((text, r) => text === last.texts[r])) {
          Object.assign(last, { layer, name: `${last.first}–${layer}` });
        } else rows.push({ first: layer, layer, texts, name });
      });
      const heads = letters.map((letter, r) => element("th", { scope: "col", title: runs[r].name,
        textContent: letter ? `${letter} ${runs[r].name}` : "token, share, KL to the output" }));
      const body = rows.map(({ layer, name }) => element("tr", {},
        element("th", { scope: "row", textContent: name }),
        ...found.map((of) => {
          if (!of) return element("td", { textContent: "–" });
          const [text, p, kl] = of[layer];
          const aside = ` ${share(p)}, ${Number(kl.toPrecision(2))} nats`;
          return element("td", {}, bdi(text), element("small", { textContent: aside }));
        })));
      layers.replaceChildren(
        element("table", { className: "tempo-layers", ariaLabel: "Layer by layer" },
          element("thead", {}, element("tr", {}, element("th", { textContent: "before" }), ...heads)),
          element("tbody", {}, ...body)),
        note("Logit lens: what the output weights make of the residual before each layer, with its "
          + "share and KL to the output. Layers with one token share a row; its numbers are of the last."));
    };
    const pathText = (run, path) =>
      path.map((i, k) => data.slots[data.sets[k].slots[i]]).join("").replaceAll("·", " ").trim();
    const showBefore = (k, i) => {
      if (k === 0) {
        before.replaceChildren(note("It is in the first set: the prompt came before it."));
        return;
      }
      if (!runs.some((run) => run.links[k - 1])) {
        before.replaceChildren(note("Not known: only a run with readout=\"mixture\" tells it."));
        return;
      }
      const { slots } = data.sets[k - 1];
      const parents = ranked(runs.map((run) => run.links[k - 1]
        && new Map(run.links[k - 1].map((row, h) => [slots[h], row[i]]))));
      const rows = parents.map(([slot, values]) => [data.slots[slot], values, `set ${k - 1}`, 1]);
      const ways = runs.flatMap((run, r) => {
        const path = run.back(k, i);
        const letter = letters[r] ? `${letters[r]} ` : "";
        return path ? [element("p", {}, element("small", { textContent: `${letter}path back ` }),
          bdi(pathText(run, path)))] : [];
      });
      before.replaceChildren(table(rows, "member of the set before"), ...ways);
    };

    const show = (at) => {
      now = at;
      details.hidden = !at;
      hint.hidden = Boolean(at);
      if (!at) { rest(); return; }
      const [k, i] = at, set = data.sets[k];
      title.replaceChildren("“", bdi(data.slots[set.slots[i]]), "”");
      const p = runs.map((run, r) =>
        `${letters[r]} ${share(data.probabilities[r][k][i])}`.trim()).join(", ");
      where.textContent = `set ${k}, member ${i + 1} of ${set.slots.length}, probability ${p}; `
        + `position ${set.position}, slot ${set.slots[i]}, token ${set.tokens[i]}`;
      if (hasAttention) showAttention(k, i);
      showNext(k, i);
      showLayers(k, i);
      showBefore(k, i);
      mark(at);
    };
    const announce = ([k, i]) => {
      const parts = runs.map((run, r) => {
        const weights = run.attention(k, i, layer, head), said = [];
        if (weights) {
          const [[slot, [value]]] = ranked([new Map(weights.entries())]);
          said.push(`attends most to “${data.slots[slot]}”, ${share(value)}`);
        }
        if (data.next) {
          const best = [...data.next[k][i].top].sort((a, b) => b[1][r] - a[1][r])[0];
          said.push(`predicts “${best[0]}”, ${share(best[1][r])}`);
        }
        const path = run.back(k, i);
        if (k && path) {
          const parent = data.slots[data.sets[k - 1].slots[path[k - 1]]];
          said.push(`came most probably after “${parent}”`);
        }
        return `${letters[r] ? `${run.name}: ` : ""}${said.join("; ")}.`;
      });
      said.textContent = parts.join(" ");
    };
    const hold = (at) => {
      held = at;
      for (const chip of members.flat()) {
        const is = Boolean(at) && chip === members[at[0]][at[1]];
        chip.classList.toggle("tempo-held", is);
        chip.setAttribute("aria-pressed", String(is));
      }
    };

    // --- hands: pointer, touch, keys
    const focus = (k, i) => {
      for (const chip of members.flat()) chip.tabIndex = -1;
      members[k][i].tabIndex = 0;
      members[k][i].focus();
    };
    members.forEach((set, k) => set.forEach((chip, i) => {
      chip.tabIndex = k === 0 && i === 0 ? 0 : -1;
      chip.setAttribute("role", "button");
      chip.setAttribute("aria-pressed", "false");
      const p = runs.map((run, r) => `${letters[r] ? `${run.name} ` : ""}${share(
        data.probabilities[r][k][i])}`).join(", ");
      chip.setAttribute("aria-label", `“${data.slots[data.sets[k].slots[i]]}”, set ${k}, `
        + `member ${i + 1} of ${set.length}, probability ${p}`);
      chip.addEventListener("pointerenter", (event) => {
        if (event.pointerType === "mouse") show([k, i]);
      });
      chip.addEventListener("pointerleave", (event) => {
        if (event.pointerType === "mouse") show(held);
      });
      chip.addEventListener("focus", () => { show([k, i]); announce([k, i]); });
      chip.addEventListener("click", () => {
        const isHeld = held && held[0] === k && held[1] === i;
        hold(isHeld ? null : [k, i]);
        show([k, i]);
        announce([k, i]);
      });
      chip.addEventListener("keydown", (event) => {
        const last = members.length - 1;
        const to = {
          ArrowLeft: [Math.max(0, k - 1), i], ArrowRight: [Math.min(last, k + 1), i],
          ArrowUp: [k, Math.max(0, i - 1)], ArrowDown: [k, i + 1], Home: [0, 0], End: [last, 0],
        }[event.key];
        if (to) focus(to[0], Math.min(to[1], members[to[0]].length - 1));
        else if (event.key === "Enter" || event.key === " ") chip.click();
        else if (event.key === "Escape") { hold(null); show(null); said.textContent = "Let go."; }
        else return;
        event.preventDefault();
      });
    }));
    for (const line of paths) {
      const path = line.dataset.members.split(",").map(Number);
      line.tabIndex = 0;
      line.setAttribute("role", "button");
      line.setAttribute("aria-pressed", "false");
      const press = () => {
        const isOn = line.getAttribute("aria-pressed") === "true";
        for (const other of paths) other.setAttribute("aria-pressed", "false");
        hold(null);
        show(null);
        trace(isOn ? null : path);
        line.setAttribute("aria-pressed", String(!isOn));
        legend.textContent = isOn ? untouched : `${untouched} Dashed: the path that is chosen.`;
      };
      line.addEventListener("click", press);
      line.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        press();
        event.preventDefault();
      });
    }
  };

  for (const view of document.querySelectorAll(".tempo-view")) {
    if (view.tempoIsReady) continue; // another view's script was first
    view.tempoIsReady = true;
    for (const group of view.querySelectorAll(".tempo-group")) setUp(group);
    view.querySelector(".tempo-steering").hidden = false;
  }
})();
