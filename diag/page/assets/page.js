// The page of overlayd. What it shows comes in words from the daemon (page/node.json, page/peers.json); this puts it in its place.
// Names and reasons come from other nodes: they only ever become text, never markup.
"use strict";
(() => {
  const nodeEvery = 2500, peersEvery = 10000, giveUpAfter = 6000, longestWait = 30000, firstRows = 25, moreRows = 200;
  const $ = (id) => document.getElementById(id);
  const make = (tag, cls, text) => {
    const e = document.createElement(tag);
    if (cls) e.className = cls;
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const put = (e, text) => { if (e.textContent !== text) e.textContent = text; };
  const dress = (e, cls) => { if (e.className !== cls) e.className = cls; };
  // sync makes parent's children those that items want, and changes no more than differs, so that a selection or focus survives.
  const sync = (parent, items, tag, fill) => {
    items.forEach((item, i) => fill(parent.children[i] || parent.appendChild(make(tag)), item));
    while (parent.children.length > items.length) parent.lastElementChild.remove();
  };

  // ---- the node -------------------------------------------------------------------------------------------------------------
  let word = $("word").textContent, mark = "";
  const showNode = (n) => {
    put($("name"), n.name);
    put($("about"), n.about);
    put($("word"), n.word);
    put($("say"), n.say);
    put($("network"), n.network);
    dress($("state"), "state " + n.state);
    document.title = n.word + ": " + n.name + " - overlayd";
    if (n.word !== word) put($("said"), "The node is now: " + n.word);
    word = n.word;
    sync($("problems"), n.problems, "li", (li, p) => {
      dress(li, p.fatal ? "fatal" : "");
      const parts = [["span", "tag", p.word], ["b", "", p.name], ["span", "reason", p.reason], ["span", "since", p.since]];
      if (!li.children.length) parts.forEach(([tag, cls]) => li.append(make(tag, cls)));
      parts.forEach((x, i) => put(li.children[i], x[2]));
    });
    $("restart").hidden = !(n.restart || []).length;
    sync($("restarts"), n.restart || [], "li", put);
    sync($("facts"), n.facts, "div", (div, f) => showFact(div, f.label, f.lines));
  };
  const showFact = (div, label, lines) => {
    if (!div.children.length) div.append(make("dt"));
    put(div.firstElementChild, label);
    lines.forEach((l, i) => {
      const dd = div.children[i + 1] || div.appendChild(make("dd"));
      dress(dd, l.alert ? "alert" : "");
      put(dd, l.text);
    });
    while (div.children.length > lines.length + 1) div.lastElementChild.remove();
  };

  // ---- the peers ------------------------------------------------------------------------------------------------------------
  const grid = $("grid"), filter = $("filter"), details = $("details"), tip = $("tip");
  const chips = [...document.querySelectorAll(".chip")];
  const states = new Map(chips.map((c) => [c.dataset.state, { chip: c, rank: +c.dataset.rank, label: c.dataset.label, meaning: c.title }]));
  let cells = new Map(); // by key: {peer, el, hay, alive}
  let shown = false, all = [], visible = []; // cells in the order of the daemon
  let wanted = new Set(), current = null, opened = null, zoom = "", columns = 0, rowsShown = firstRows, suffix = "";

  const keyOf = (p) => JSON.stringify([p.name, p.subnet, p.ip]);
  const nameOf = (p) => p.name || p.subnet;
  const describe = (p) => [nameOf(p), p.subnet, states.get(p.state).label, p.rtt, p.reason].filter(Boolean).join(", ");

  const showPeers = (peers) => {
    const next = new Map();
    let changed = !shown || cells.size !== peers.length;
    shown = true;
    all = peers.map((p) => {
      let key = keyOf(p);
      while (next.has(key)) key += "+";
      let cell = cells.get(key);
      if (!cell) {
        cell = { el: make("div"), key };
        cell.el.setAttribute("role", "gridcell");
        cell.el.tabIndex = -1;
        cell.el.cell = cell;
        changed = true;
      }
      if (!cell.peer || cell.peer.state !== p.state) changed = true; // may now be shown, or no longer
      cell.peer = p;
      cell.hay = [p.name, p.subnet, p.ip, p.id].join("\n").toLowerCase();
      cell.range = undefined;
      next.set(key, cell);
      return cell;
    });
    cells = next;
    if (opened && !cells.has(opened.key)) close(false);
    count();
    if (changed) {
      suffix = commonSuffix();
      select();
    } else {
      visible.forEach(paint);
      list();
    }
    if (opened) showDetails();
  };

  const count = () => {
    const by = new Map(), steps = [0, 0, 0, 0, 0];
    for (const { peer: p } of all) {
      by.set(p.state, (by.get(p.state) || 0) + 1);
      if (p.state === "answers") steps[p.step]++;
    }
    for (const [name, s] of states) {
      const n = by.get(name) || 0;
      put(s.chip.querySelector("b"), String(n));
      s.chip.classList.toggle("zero", n === 0);
    }
    document.querySelectorAll("#scale b").forEach((b, i) => put(b, String(steps[i])));
  };

  // A name's end that all of them have, such as .example.net, only takes up room.
  const commonSuffix = () => {
    const names = all.map((c) => c.peer.name).filter(Boolean);
    if (names.length < 2) return "";
    let s = names[0].slice(names[0].indexOf(".") >>> 0);
    while (s && !names.every((n) => n.endsWith(s) && n.length > s.length)) s = s.slice(s.indexOf(".", 1) >>> 0);
    return s;
  };

  // ---- filter: every word must be found; an IP also finds the node whose subnet it is in --------------------------------------
  const bits = (text) => { // an address as a string of bits, or null
    if (/^\d+(\.\d+){3}$/.test(text)) {
      const n = text.split(".").map(Number);
      return n.every((x) => x < 256) ? n.map((x) => x.toString(2).padStart(8, "0")).join("") : null;
    }
    const halves = text.split("::");
    if (!/^[0-9a-f:]+$/.test(text) || !text.includes(":") || halves.length > 2) return null;
    const [head, tail] = [halves[0], halves[1] || ""].map((h) => (h ? h.split(":") : []));
    const gap = 8 - head.length - tail.length;
    if (halves.length === 2 ? gap < 1 : gap !== 0) return null;
    const groups = [...head, ...Array(Math.max(gap, 0)).fill("0"), ...tail];
    return groups.every((g) => /^[0-9a-f]{1,4}$/.test(g)) ? groups.map((g) => parseInt(g, 16).toString(2).padStart(16, "0")).join("") : null;
  };
  const within = (cell, address) => {
    if (cell.range === undefined) {
      const [network, length] = cell.peer.subnet.split("/"), b = length && bits(network.toLowerCase());
      cell.range = b ? { all: b.length, start: b.slice(0, +length) } : null;
    }
    return cell.range !== null && cell.range.all === address.length && address.startsWith(cell.range.start);
  };

  const select = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean).map((w) => ({ w, address: bits(w) }));
    visible = all.filter((c) => (!wanted.size || wanted.has(c.peer.state)) &&
      words.every(({ w, address }) => c.hay.includes(w) || (address && within(c, address))));
    put($("shown"), visible.length === all.length ? String(all.length) : visible.length + " of " + all.length);
    $("none").hidden = visible.length > 0;
    put($("none"), all.length ? "No peer matches." : "This node has no peers yet.");
    rowsShown = firstRows;
    lay(true);
    list();
  };

  // ---- the grid ---------------------------------------------------------------------------------------------------------------
  const coarse = matchMedia("(pointer: coarse)");
  const zooms = { near: [204, 6], middle: [138, 5], far: [15, 2] }; // width of a tile and the gap, in pixels
  const zoomFor = (n) => (n <= 24 ? "near" : n <= 240 ? "middle" : "far");

  // lay puts the tiles into rows; anew only where the number of columns or the choice of tiles has changed.
  const lay = (anew) => {
    grid.hidden = visible.length === 0;
    $("keys").hidden = grid.hidden;
    const z = zoomFor(visible.length), width = grid.parentElement.clientWidth;
    let [tile, gap] = zooms[z];
    if (z === "far" && coarse.matches) tile = 22;
    const n = Math.max(1, Math.floor((width + gap) / (tile + gap)));
    if (!anew && n === columns && z === zoom) return;
    const focused = grid.contains(document.activeElement);
    columns = n;
    zoom = z;
    grid.className = "grid " + z;
    grid.style.setProperty("--columns", String(n));
    grid.style.setProperty("--tile", tile + "px");
    grid.setAttribute("aria-colcount", String(n));
    const rows = document.createDocumentFragment();
    for (let i = 0; i < visible.length; i += n) {
      const row = make("div", "row");
      row.setAttribute("role", "row");
      for (let j = i; j < Math.min(i + n, visible.length); j++) {
        visible[j].index = j;
        paint(visible[j]);
        row.append(visible[j].el);
      }
      rows.append(row);
    }
    grid.replaceChildren(rows);
    if (!current || visible[current.index] !== current) rove(visible[Math.min(current ? current.index : 0, visible.length - 1)]);
    if (focused && current) current.el.focus({ preventScroll: true });
  };

  const paint = (cell) => {
    const p = cell.peer, el = cell.el, tile = "tile " + p.state + (p.state === "answers" ? " r" + p.step : "");
    const label = describe(p), picked = cell === opened ? " picked" : "";
    const value = p.state === "answers" ? p.rtt || "" : states.get(p.state).label;
    const look = [zoom, tile, picked, label, value].join("\n");
    if (cell.look === look) return;
    cell.look = look;
    el.setAttribute("aria-label", label);
    el.setAttribute("aria-selected", String(cell === opened));
    if (zoom === "far") {
      el.className = "cell " + tile + picked;
      if (el.firstChild) el.replaceChildren();
      return;
    }
    el.className = "cell is-" + p.state + picked;
    if (!el.firstChild) el.append(make("i"), make("span", "name"), make("span", "sub"), make("span", "value"));
    const name = p.name && suffix && p.name.endsWith(suffix) ? p.name.slice(0, -suffix.length) : nameOf(p);
    dress(el.children[0], tile);
    put(el.children[1], name);
    put(el.children[2], p.subnet);
    put(el.children[3], value);
  };

  const rove = (cell) => {
    if (current) current.el.tabIndex = -1;
    current = cell || null;
    if (current) current.el.tabIndex = 0;
  };
  const moveTo = (index) => {
    const cell = visible[Math.max(0, Math.min(visible.length - 1, index))];
    rove(cell);
    cell.el.focus();
    cell.el.scrollIntoView({ block: "nearest" });
    if (opened) aside(cell);
  };
  const cellAt = (target) => { const el = target.closest && target.closest(".cell"); return el ? el.cell : null; };

  grid.addEventListener("keydown", (e) => {
    if (!current || e.altKey || e.metaKey) return;
    const i = current.index, rowStart = i - (i % columns), page = columns * 8;
    const to = {
      ArrowLeft: i - 1, ArrowRight: i + 1, ArrowUp: i - columns < 0 ? i : i - columns, ArrowDown: i + columns,
      Home: e.ctrlKey ? 0 : rowStart, End: e.ctrlKey ? visible.length - 1 : rowStart + columns - 1, PageUp: i - page, PageDown: i + page,
    }[e.key];
    if (to !== undefined) moveTo(to);
    else if (e.key === "Enter" || e.key === " ") open(current, true);
    else return;
    e.preventDefault();
  });
  grid.addEventListener("click", (e) => { const c = cellAt(e.target); if (c) { rove(c); open(c, false); } });
  grid.addEventListener("focusin", (e) => { const c = cellAt(e.target); if (c) { rove(c); if (c.el.matches(":focus-visible")) hint(c); } });
  grid.addEventListener("focusout", () => { tip.hidden = true; });
  grid.addEventListener("pointerover", (e) => { const c = cellAt(e.target); if (c) hint(c); });
  grid.addEventListener("pointerleave", () => { tip.hidden = true; });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  const hint = (cell) => {
    if (zoom === "near") return;
    put(tip, describe(cell.peer));
    tip.hidden = false;
    const at = cell.el.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const below = at.bottom + 6 + own.height < innerHeight;
    tip.style.left = Math.max(4, Math.min(at.left, innerWidth - own.width - 4)) + "px";
    tip.style.top = (below ? at.bottom + 6 : at.top - own.height - 6) + "px";
  };

  // ---- details ----------------------------------------------------------------------------------------------------------------
  const open = (cell, focus) => {
    const before = opened;
    opened = cell;
    if (before) paint(before);
    paint(cell);
    showDetails();
    details.hidden = false;
    tip.hidden = true;
    aside(cell);
    if (focus) $("details-name").focus();
  };
  // aside keeps the details from covering the tile.
  const aside = (cell) => {
    details.classList.remove("left");
    const at = cell.el.getBoundingClientRect(), covered = () => {
      const own = details.getBoundingClientRect();
      return cell.el.isConnected && at.right > own.left - 8 && at.left < own.right + 8 && at.bottom > own.top - 8;
    };
    if (covered()) details.classList.add("left");
    if (covered()) scrollBy(0, at.top - 80);
  };
  const close = (back) => {
    const was = opened;
    opened = null;
    details.hidden = true;
    if (was) paint(was);
    if (back && was && visible[was.index] === was) moveTo(was.index);
  };
  const pingsText = (p) => (p.sent ? p.lost + " of the last " + p.sent + " lost" + (p.rtt ? ", RTT " + p.rtt : "") : "none sent yet");
  const showDetails = () => {
    const p = opened.peer, s = states.get(p.state);
    put($("details-name"), nameOf(p));
    dress($("details-tile"), "tile " + p.state + (p.state === "answers" ? " r" + p.step : ""));
    put($("details-state"), s.label + (p.state === "answers" && p.rtt ? ", " + p.rtt : ""));
    put($("details-meaning"), p.reason ? p.reason + ". " + s.meaning : s.meaning);
    const rows = [
      ["Subnet", p.subnet], ["Public IP", p.ip], ["Path", p.path], ["Tunnel MAC", p.mac], ["Pinged at", p.address],
      ["Small pings", p.small && pingsText(p.small)], ["Full-size pings", p.full && pingsText(p.full)],
      ["Last answer", p.lastAnswer && p.lastAnswer + " ago"], ["ID", p.id],
      ["On the node", "overlayd status --peer " + (p.name || p.subnet)],
    ].filter((r) => r[1]);
    sync($("details-facts"), rows, "div", (div, [label, text]) => showFact(div, label, [{ text }]));
  };
  $("close").addEventListener("click", () => close(true));
  addEventListener("keydown", (e) => {
    if (e.key === "Escape" && opened) {
      close(true);
      e.preventDefault();
    } else if (e.key === "Escape" && e.target === filter) {
      filter.value = "";
      select();
    } else if (e.key === "/" && !e.ctrlKey && !e.metaKey && !e.altKey && e.target !== filter) {
      filter.focus();
      filter.select();
      e.preventDefault();
    }
  });

  // ---- the list ---------------------------------------------------------------------------------------------------------------
  const list = () => {
    const rank = (c) => states.get(c.peer.state).rank;
    const sorted = [...visible].sort((a, b) => rank(a) - rank(b) || (b.peer.ns || 0) - (a.peer.ns || 0));
    const loss = (p) => (p.small ? p.small.lost + " of " + p.small.sent + " / " + p.full.lost + " of " + p.full.sent : "");
    sync($("rows"), sorted.slice(0, rowsShown), "tr", (tr, c) => {
      const p = c.peer;
      if (!tr.children.length) {
        const first = make("td"), button = make("button", "link"), second = make("td");
        button.type = "button";
        first.append(make("i"), make("span"));
        second.append(button);
        tr.append(first, second, ...Array.from({ length: 6 }, () => make("td")));
        button.addEventListener("click", () => { rove(tr.cell); open(tr.cell, true); });
      }
      tr.cell = c;
      const td = tr.children;
      dress(td[0].children[0], "tile " + p.state + (p.state === "answers" ? " r" + p.step : ""));
      put(td[0].children[1], states.get(p.state).label);
      put(td[1].firstChild, p.name || "-");
      [p.subnet, p.ip, p.path, p.rtt, loss(p), p.reason].forEach((text, i) => put(td[i + 2], text || ""));
    });
    $("list").hidden = visible.length === 0;
    const rest = sorted.length - rowsShown;
    $("more").hidden = rest <= 0;
    put($("more"), "Show " + Math.min(rest, moreRows) + " more of " + rest);
  };
  $("more").addEventListener("click", () => { rowsShown += moreRows; list(); });

  let typing = 0;
  filter.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(select, all.length > 500 ? 80 : 0); });
  chips.forEach((c) => {
    c.disabled = false;
    c.addEventListener("click", () => {
      const s = c.dataset.state;
      if (!wanted.delete(s)) wanted.add(s);
      c.setAttribute("aria-pressed", String(wanted.has(s)));
      select();
    });
  });
  new ResizeObserver(() => { if (all.length) lay(false); }).observe(grid.parentElement);

  // ---- asking the daemon ------------------------------------------------------------------------------------------------------
  let answered = $("gone").hidden ? Date.now() : 0, failures = 0, timer = 0, ticker = 0, running = false, peersAt = 0, peersCost = 0, nextTry = 0, trouble = "";
  class Trouble extends Error {}
  const ask = async (path) => {
    const signal = AbortSignal.timeout(giveUpAfter);
    try {
      const r = await fetch(path, { cache: "no-store", signal });
      if (r.ok) return await r.json();
      throw new Trouble(r.status === 503 ? (await r.text()).trim() : "The daemon answers with HTTP " + r.status);
    } catch (e) {
      throw e instanceof Trouble ? e : new Trouble("No answer from the daemon");
    }
  };
  const plan = (ms) => {
    clearTimeout(timer);
    nextTry = Date.now() + ms;
    if (!document.hidden) timer = setTimeout(round, ms);
  };
  const round = async () => {
    if (running || document.hidden) return;
    running = true;
    try {
      const n = await ask("page/node.json");
      showNode(n);
      // At once when something has changed, but the larger the network and the slower the line, the more seldom.
      const least = Math.max(nodeEvery - 500, 2 * all.length, 20 * peersCost), age = Date.now() - peersAt;
      if (age >= Math.max(peersEvery, least) || (n.mark !== mark && age >= least)) {
        const start = performance.now();
        showPeers(await ask("page/peers.json"));
        performance.mark("peers shown");
        peersCost = performance.now() - start;
        peersAt = Date.now();
        mark = n.mark;
      }
      answered = Date.now();
      failures = 0;
    } catch (e) {
      failures++;
      trouble = e.message;
      if (!(e instanceof Trouble)) reportError(e);
    }
    running = false;
    plan(failures ? Math.min(longestWait, nodeEvery * 2 ** (failures - 1)) : nodeEvery);
    tell();
  };
  const clock = (t) => new Date(t).toLocaleTimeString([], { hour12: false });
  const tell = () => {
    const gone = failures > 0;
    document.body.classList.toggle("old", gone);
    $("gone").hidden = !gone;
    $("again").hidden = false;
    if (gone) put($("gone-text"), trouble + (answered ? ". Showing the state of " + clock(answered) + "." : "."));
    const wait = Math.max(0, Math.round((nextTry - Date.now()) / 1000));
    put($("live"), gone ? "retrying in " + wait + " s" : "live, as of " + clock(answered));
    clearInterval(ticker);
    if (gone && !document.hidden) ticker = setInterval(() => { if (!running) put($("live"), "retrying in " + Math.max(0, Math.round((nextTry - Date.now()) / 1000)) + " s"); }, 1000);
  };
  $("again").addEventListener("click", () => plan(0));
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      clearTimeout(timer);
      clearInterval(ticker);
    } else {
      plan(0);
    }
  });
  $("find").hidden = false;
  plan(0);
})();
