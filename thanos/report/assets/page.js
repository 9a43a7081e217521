"use strict";
(() => {
  const number = (value, form) => {
    if (value === null || value === undefined) return "–";
    if (form === "share") return (value * 100).toFixed(2) + "%";
    if (form === "count") return Math.round(value).toLocaleString("en-US");
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 1e-3 && size < 1e5 ? String(+value.toPrecision(3)) : value.toExponential(2);
  };
  const element = (name, text, style) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (style) made.className = style;
    return made;
  };

  // Values under the pointer.
  const tip = document.getElementById("tip");
  for (const area of document.querySelectorAll(".area")) {
    const data = JSON.parse(area.dataset.plot);
    const drawing = area.querySelector(".drawing");
    const cross = element("div", undefined, "cross");
    cross.hidden = true;
    drawing.append(cross);
    const hide = () => { tip.hidden = cross.hidden = true; };
    const show = (event) => {
      const box = drawing.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      if (share < 0 || share > 1) return hide();
      const at = Math.min(data.places.length - 1, Math.floor(share * data.places.length));
      cross.style.left = ((at + 0.5) / data.places.length) * 100 + "%";
      tip.replaceChildren(element("b", data.axis + " " + data.places[at]));
      data.lines.forEach((line, index) => {
        if (line.values[at] === null) return;
        const row = element("div");
        row.append(element("i", line.name, "c" + (index % 8)));
        const spread = line.low.length ? " (" + number(line.low[at], data.form) + " to " + number(line.high[at], data.form) + ")" : "";
        row.append(element("span", number(line.values[at], data.form) + spread));
        tip.append(row);
      });
      tip.hidden = cross.hidden = false;
      const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
      tip.style.left = Math.max(6, right ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16) + "px";
      tip.style.top = Math.max(6, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 6)) + "px";
    };
    drawing.addEventListener("pointermove", show);
    drawing.addEventListener("pointerdown", show);
    drawing.addEventListener("pointerleave", hide);
  }
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const code = button.previousElementSibling;
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        getSelection().selectAllChildren(code);
        document.execCommand("copy");
      }
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  // The table: only the rows in sight are in the document.
  const source = document.getElementById("layers");
  if (!source) return;
  const columns = JSON.parse(source.textContent);
  const scroller = document.querySelector(".scroller");
  const table = scroller.querySelector("table");
  const [head, body] = [table.tHead, table.tBodies[0]];
  const input = document.querySelector(".tools input");
  const output = document.querySelector(".tools output");
  const total = columns[0].values.length;
  const HEIGHT = 30, MARGIN = 12, PRINTED = 120;
  let rows = Array.from({ length: total }, (_, index) => index);
  let sorted = { column: null, down: true };
  let printing = false;

  // A narrow screen shows of a name what is its own.
  const narrow = innerWidth < 640;
  let prefix = 0;
  if (narrow && total > 1) {
    const [first] = columns[0].values;
    let shared = first.length;
    for (const name of columns[0].values) while (!name.startsWith(first.slice(0, shared))) shared--;
    prefix = first.slice(0, shared).lastIndexOf(".") + 1;
  }

  const longest = columns.map((column) => {
    const { label } = column; // a long one takes two lines
    let most = label.length > 16 && label.includes(" ") ? Math.ceil(label.length / 2) + 4 : label.length + 3;
    const step = Math.max(1, Math.floor(total / 2000));
    for (let row = 0; row < total; row += step) {
      const value = column.values[row];
      most = Math.max(most, column.form === "text" ? value.length : number(value, column.form).length);
    }
    return most;
  });
  const group = element("colgroup");
  let wide = 0;
  columns.forEach((column, index) => {
    const most = index === 0 && narrow ? 190 : 520;
    const width = Math.round(Math.min(most, (longest[index] - (index === 0 ? prefix : 0)) * 7.5 + 26));
    wide += width;
    const made = element("col");
    made.style.width = width + "px";
    group.append(made);
  });
  table.prepend(group);
  table.style.width = wide + "px";

  const heading = head.insertRow();
  columns.forEach((column, index) => {
    const cell = element("th", undefined, column.form === "text" ? "text" : "");
    cell.scope = "col";
    cell.title = column.help;
    const button = element("button", column.label);
    button.type = "button";
    button.addEventListener("click", () => {
      // The first click shows the largest of numbers, the first of names.
      sorted = sorted.column === index ? { column: index, down: !sorted.down } : { column: index, down: column.form !== "text" };
      for (const other of heading.cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      for (const [at, other] of [...heading.cells].entries()) other.firstChild.textContent = columns[at].label + (other === cell ? (sorted.down ? " ↓" : " ↑") : "");
      update();
    });
    cell.append(button);
    heading.append(cell);
  });

  const compared = /(.+?)\s*(<=|>=|<|>|=)\s*(-?[\d.]+(?:e[+-]?\d+)?)(%?)/i;
  const matcher = (text) => {
    const tests = [];
    for (const part of text.toLowerCase().split(",")) {
      const found = compared.exec(part);
      const column = found && columns.find((one) => one.form !== "text" && one.label.toLowerCase() === found[1].trim());
      if (column) {
        const limit = parseFloat(found[3]) / (found[4] ? 100 : 1);
        const holds = { "<": (a) => a < limit, ">": (a) => a > limit, "<=": (a) => a <= limit, ">=": (a) => a >= limit, "=": (a) => a === limit }[found[2]];
        tests.push((row) => column.values[row] !== null && holds(column.values[row]));
      } else {
        for (const word of part.split(/\s+/).filter(Boolean)) tests.push((row) => columns[0].values[row].toLowerCase().includes(word));
      }
    }
    return (row) => tests.every((test) => test(row));
  };
  const size = (text) => text.split(" × ").reduce((product, side) => product * Number(side), 1);

  function update() {
    rows = [];
    const holds = matcher(input.value);
    for (let row = 0; row < total; row++) if (holds(row)) rows.push(row);
    if (sorted.column !== null) {
      const { values, form, name } = columns[sorted.column];
      const sign = sorted.down ? -1 : 1;
      const names = new Intl.Collator("en", { numeric: true }).compare;
      rows.sort((a, b) => {
        const [x, y] = [values[a], values[b]];
        if (name === "shape") return sign * (size(x) - size(y)) || a - b;
        if (form === "text") return sign * names(x, y) || a - b;
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return sign * (x - y) || a - b;
      });
    }
    output.textContent = rows.length === total ? total.toLocaleString("en-US") + " layers" : rows.length.toLocaleString("en-US") + " of " + total.toLocaleString("en-US") + " layers";
    scroller.scrollTop = 0;
    render();
  }

  function render() {
    const begin = printing ? 0 : Math.max(0, Math.floor(scroller.scrollTop / HEIGHT) - MARGIN);
    const end = printing ? Math.min(rows.length, PRINTED) : Math.min(rows.length, begin + Math.ceil(scroller.clientHeight / HEIGHT) + 2 * MARGIN);
    const made = document.createDocumentFragment();
    const gap = (count) => {
      const row = element("tr", undefined, "gap");
      const cell = element("td");
      cell.colSpan = columns.length;
      cell.style.height = (printing ? 0 : count * HEIGHT) + "px";
      row.append(cell);
      made.append(row);
    };
    gap(begin);
    for (const row of rows.slice(begin, end)) {
      const line = element("tr");
      for (const column of columns) {
        const text = column.form === "text" ? column.values[row] : number(column.values[row], column.form);
        const cell = element("td", column === columns[0] ? text.slice(prefix) : text, column.form === "text" ? "text" : "");
        if (column.form === "text") cell.title = text;
        line.append(cell);
      }
      made.append(line);
    }
    gap(rows.length - end);
    if (printing && end < rows.length) {
      const row = element("tr");
      const cell = element("td", "and " + (rows.length - end).toLocaleString("en-US") + " more, in pruning.json", "text");
      cell.colSpan = columns.length;
      row.append(cell);
      made.append(row);
    }
    body.replaceChildren(made);
  }

  let waiting = false;
  scroller.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; render(); });
  }, { passive: true });
  input.addEventListener("input", update);
  addEventListener("resize", render);
  addEventListener("beforeprint", () => { printing = true; render(); });
  addEventListener("afterprint", () => { printing = false; render(); });
  update();
})();
