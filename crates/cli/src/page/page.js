"use strict";
// Sorts and filters the page's main table; everything else of the page is there without it.
(() => {
  const table = document.querySelector("table.rows");
  if (!table) return;
  const body = table.tBodies[0];
  // Rows that are equal stay in the order in which they came.
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const tools = document.querySelector(".tools");
  const shown = document.getElementById("shown");
  const none = document.querySelector(".none");
  const find = document.getElementById("find");
  const boxes = [...tools.querySelectorAll("input[type=checkbox]")];
  // Rows that are of accesses say of how many.
  const counted = rows.some((row) => "count" in row.dataset);
  const total = rows.reduce((sum, row) => sum + Number(row.dataset.count), 0);
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const plural = (count, one, more) => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;

  const key = (row, place, how) => {
    const cell = row.cells[place];
    return how === "n" ? Number(cell.dataset.n) : cell.textContent.trim();
  };

  const sort = (head) => {
    const place = heads.indexOf(head);
    const how = head.dataset.sort;
    const up = head.getAttribute("aria-sort") !== "ascending";
    const keyed = rows.map((row) => [key(row, place, how), row]);
    keyed.sort(([a], [b]) => {
      const order = how === "n" ? a - b : a.localeCompare(b, "en", { numeric: true });
      return up ? order : -order;
    });
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...keyed.map(([, row]) => row));
  };

  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const on = (name) => boxes.filter((box) => box.name === name && box.checked).map((box) => box.value);
    const [ops, kinds, broken] = [on("op"), on("kind"), on("broken").length > 0];
    let left = 0;
    let accesses = 0;
    for (const row of rows) {
      const got = (row.dataset.got || "").split(" ");
      const fits =
        (!counted || (ops.includes(row.dataset.op) && kinds.some((kind) => got.includes(kind)))) &&
        (!broken || "broken" in row.dataset) &&
        words.every((word) => texts.get(row).includes(word));
      row.hidden = !fits;
      if (fits) {
        left += 1;
        accesses += Number(row.dataset.count);
      }
    }
    none.hidden = left > 0;
    const part = (some, all, one, more) =>
      some === all ? plural(all, one, more) : `${some.toLocaleString("en")} of ${plural(all, one, more)}`;
    const told = [part(left, rows.length, "row", "rows")];
    if (counted) told.push(part(accesses, total, "access", "accesses"));
    shown.textContent = told.join(", ");
  };

  for (const head of heads.filter((head) => head.dataset.sort)) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(head));
  }
  find.addEventListener("input", filter);
  boxes.forEach((box) => box.addEventListener("change", filter));
  // A link from the map leads to a row that may be filtered out.
  addEventListener("hashchange", () => {
    const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (row && row.hidden) {
      find.value = "";
      boxes.forEach((box) => (box.checked = box.name !== "broken"));
      filter();
      row.scrollIntoView();
    }
  });
  // A browser keeps what was typed when a page is loaded again.
  filter();
  tools.hidden = false;
})();
