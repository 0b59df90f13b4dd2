"use strict";
// Tables marked "sortable" sort by the column whose header button is pressed; the layer table filters, and the spectra
// follow it. Everything is there without this script.
(() => {
  const value = (row, column) => {
    const cell = row.cells[column];
    const number = cell.dataset.value;
    return number === undefined ? cell.textContent : number === "" ? null : Number(number);
  };

  const compare = (a, b) => {
    if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      header.querySelector("button").addEventListener("click", () => {
        const descending = header.getAttribute("aria-sort") === "ascending";
        headers.forEach((other) => other.setAttribute("aria-sort", "none"));
        header.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const body = table.tBodies[0];
        const keyed = [...body.rows].map((row) => [value(row, column), row]);
        keyed.sort(([a], [b]) => (a === null || b === null || !descending ? compare(a, b) : compare(b, a)));
        body.append(...keyed.map(([, row]) => row));
      });
    });
  }

  const controls = document.getElementById("layer-controls");
  if (controls === null) return;
  const words = document.getElementById("layer-words");
  const role = document.getElementById("layer-role");
  const count = document.getElementById("layer-count");
  const rows = [...document.getElementById("layer-table").tBodies[0].rows];
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const name = row.dataset.name.toLowerCase();
      const fits = wanted.every((word) => name.includes(word)) && (role.value === "" || row.dataset.role === role.value);
      row.hidden = !fits;
      const figure = document.getElementById(row.dataset.figure);
      if (figure !== null) figure.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    count.textContent = `${shown} of ${rows.length} layers`;
  };
  words.addEventListener("input", filter);
  role.addEventListener("change", filter);
  controls.hidden = false;
  filter();
})();
