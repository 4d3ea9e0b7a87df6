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
        body.append(...rows.slice().sort(order));
      });
    });
    const filters = table.closest("section").querySelector(".tempo-filters");
    const said = filters.querySelector("output");
    const apply = () => {
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
  // the list of tests is folded, unless a link leads to it
  const tests = document.querySelector("#tempo-tests details");
  const unfold = () => { if (tests && location.hash === "#tempo-tests") tests.open = true; };
  addEventListener("hashchange", unfold);
  unfold();
})();
