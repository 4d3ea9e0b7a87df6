"use strict";
(() => {
  for (const table of document.querySelectorAll(".tempo-claims")) {
    const body = table.tBodies[0], rows = [...body.rows];
    const key = (row, column, numeric) => {
      const value = row.cells[column].dataset.value;
      return numeric ? (value === "" ? NaN : Number(value)) : value;
    };
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending", numeric = head.dataset.sort === "number";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const sign = down ? -1 : 1;
        // rows without a number stay last either way; equal ones keep their order
        const order = (a, b) => {
          const x = key(a, column, numeric), y = key(b, column, numeric);
          if (numeric && (Number.isNaN(x) || Number.isNaN(y))) return Number.isNaN(x) - Number.isNaN(y);
          return sign * (numeric ? x - y : x < y ? -1 : x > y ? 1 : 0);
        };
        body.append(...rows.slice().sort(order));
      });
    });
    const filters = table.closest("section").querySelector(".tempo-filters"), said = filters.querySelector("output");
    const apply = () => {
      const shown = new Set([...filters.querySelectorAll("input:checked")].map((box) => box.value));
      for (const row of rows) row.hidden = !shown.has(row.dataset.verdict);
      said.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} claims`;
    };
    filters.hidden = false;
    filters.addEventListener("change", apply);
    apply();
    // a link to a claim shows it, whatever the filters say
    const reveal = () => {
      const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
      const row = target && target.closest(".tempo-claims tr");
      if (row && row.hidden) {
        for (const box of filters.querySelectorAll("input")) box.checked = true;
        apply();
        target.scrollIntoView();
      }
    };
    addEventListener("hashchange", reveal);
    reveal();
  }
  const tests = document.getElementById("tempo-tests");
  if (!tests) return;
  const open = () => { if (location.hash === "#tempo-tests") tests.open = true; };
  addEventListener("hashchange", open);
  open();
  // pytest-html's own controls, for the keyboard: it draws its rows anew at each change
  const clickable = ".sortable, .collapsible .col-result, .logexpander, #environment-header h2";
  const reachable = () => tests.querySelectorAll(clickable).forEach((element) => {
    if (element.tabIndex === 0) return;
    element.tabIndex = 0;
    if (!element.matches("th, td")) element.setAttribute("role", "button");
  });
  new MutationObserver(reachable).observe(tests, { childList: true, subtree: true });
  reachable();
  tests.addEventListener("keydown", (event) => {
    if ((event.key === "Enter" || event.key === " ") && event.target.matches(clickable)) {
      event.preventDefault();
      event.target.click();
    }
  });
})();
