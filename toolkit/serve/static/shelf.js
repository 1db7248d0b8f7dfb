"use strict";
// The catalogue: what can be got, how it comes, and the way from there to a conversation.
const HUB_ID = /^\w[\w.-]*\/\w[\w.-]*(:[\w.-]+(\/[\w.-]+)*\.gguf)?$/;
const PHASES = { "": "Looking at the checkpoint", download: "Downloading", calibrate: "Calibrating", ranges: "Measuring ranges", pack: "Packing weights" };
const POLL_MS = 400;
let groups = null;
let polling = null;

async function fromServer(path, body) {
  const sent = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  const reply = await fetch(path, { headers: headers(), ...sent });
  const answer = await reply.json();
  if (!reply.ok) throw new Error(answer.error.message);
  return answer;
}

// Rows of one model, a row a target, are one card; each bundle is one of its own.
function grouped(rows) {
  const found = new Map();
  for (const row of rows) {
    const key = row.facts.kind === "bundle" ? `bundle ${row.name}` : `${row.facts.kind} ${row.name}`;
    if (!found.has(key)) found.set(key, { name: row.name, kind: row.facts.kind, rows: [] });
    found.get(key).rows.push(row.facts);
  }
  const order = ["hub", "bundle", "recipe"];
  return [...found.values()].sort((a, b) => order.indexOf(a.kind) - order.indexOf(b.kind));
}

function bytes(count) {
  const mib = count / 2 ** 20;
  return mib >= 1024 ? `${(mib / 1024).toFixed(2)} GiB` : `${mib.toFixed(1)} MiB`;
}

function figuresOf(facts) {
  const speed = facts.decode_tokens_per_s
    ? `${facts.decode_tokens_per_s.toFixed(1)} tokens/s measured`
    : facts.predicted_tokens_per_s ? `at most ${facts.predicted_tokens_per_s.toPrecision(2) * 1} tokens/s` : null;
  return [
    bytes(facts.bundle_bytes), facts.bits_per_weight ? `${facts.bits_per_weight.toFixed(2)} bits a weight` : null,
    `${facts.context_length.toLocaleString("en")} tokens of context`, speed, facts.license ? `licence ${facts.license}` : null,
    facts.mean_kld === undefined ? null : `KLD ${facts.mean_kld.toPrecision(2)}`,
    facts.top1_agreement === undefined ? null : `same token ${(100 * facts.top1_agreement).toFixed(1)}%`,
    facts.accuracy === undefined ? null : `${(100 * facts.accuracy).toFixed(1)}% of answers right`,
  ].filter(Boolean);
}

function card(group) {
  const item = make("li");
  const head = item.appendChild(make("div", "head"));
  const title = group.kind === "recipe" ? group.rows[0].model.split("/").pop() : group.name;
  head.append(make("h2", "", title));
  const rows = $("runs").checked && group.rows.some((row) => row.runs_here) ? group.rows.filter((row) => row.runs_here) : group.rows;
  const facts = item.appendChild(make("ul", "facts"));
  const here = make("p", "here");
  const show = (row) => {
    facts.replaceChildren(...figuresOf(row).map((text) => make("li", "", text)));
    here.textContent = `${group.kind === "bundle" ? "made here" : row.model}, for ${row.target}: ${row.here}`;
  };
  let chosen = () => rows[0];
  if (rows.length > 1) {
    const label = head.appendChild(make("label", "", "Target "));
    const select = label.appendChild(make("select"));
    for (const row of rows) select.add(new Option(row.target, row.target));
    chosen = () => rows[select.selectedIndex];
    select.onchange = () => show(chosen());
  }
  const act = head.appendChild(make("button", "act", group.kind === "bundle" ? "Talk" : "Get"));
  act.type = "button";
  act.setAttribute("aria-label", `${act.textContent} ${group.kind === "bundle" ? "to " : ""}${title}`);
  act.onclick = () => (group.kind === "bundle" ? open(group.name) : get(group.name, chosen().target));
  item.append(here);
  show(rows[0]);
  return item;
}

function showCards() {
  const text = $("words").value.trim();
  $("hub").hidden = !HUB_ID.test(text);
  if (!groups) return;
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = groups.filter((group) => {
    const said = group.rows.map((row) => [group.name, row.kind, row.recipe, row.model, row.target, row.license].join(" ")).join(" ").toLowerCase();
    return words.every((word) => said.includes(word)) && (!$("runs").checked || group.rows.some((row) => row.runs_here));
  });
  $("cards").replaceChildren(...shown.map(card));
  const unknown = $("hub").hidden ? "Another model of the hub is found by owner/name." : "Look on the hub for it.";
  $("found").textContent = shown.length ? `${shown.length} of ${groups.length} models and bundles` : `Nothing here is called so. ${unknown}`;
  $("found").className = "";
}

async function look(hubId) {
  $("found").className = "";
  $("found").textContent = hubId ? `Asking the hub for ${hubId}…` : "Looking what there is…";
  try {
    const { rows } = await fromServer("/playground/catalogue" + (hubId ? `?hub=${encodeURIComponent(hubId)}` : ""));
    // A checkpoint of the hub that was looked for stays when the whole catalogue is looked at anew, which has none.
    const stays = (group) => (hubId ? group.name !== hubId : group.kind === "hub");
    const kept = (groups ?? []).filter(stays);
    groups = hubId ? [...grouped(rows), ...kept] : [...kept, ...grouped(rows)];
    showCards();
  } catch (problem) {
    $("found").className = "error";
    $("found").textContent = problem.message;
  }
}

function showModels(shown) {
  $("models").hidden = !shown;
  if (shown) $("status").textContent = "";
  $("models-open").textContent = shown ? "Back to talking" : "Models";
  $("models-open").setAttribute("aria-expanded", String(shown));
  for (const id of ["columns", "ask", "settings", "beside", "anew"]) $(id).hidden = shown;
  $(shown ? "words" : "question").focus();
  if (shown && !groups) look();
}

function offerModels() {
  if (!$("models-open").hidden) return;
  $("models-open").hidden = false;
  if (!bundles.length) showModels(true);
  poll();
}

async function open(name) {
  try {
    const served = bundles.find((bundle) => bundle.name === name) ? name : (await fromServer("/playground/open", { name })).name;
    await talkTo(served);
  } catch (problem) {
    $("found").className = "error";
    $("found").textContent = problem.message;
  }
}

async function talkTo(name) {
  await listBundles();
  if (stopping) stopping.abort();
  columns[0].cut(0);
  columns[0].offer(name);
  showModels(false);
}

async function get(model, target) {
  try {
    const quality = $("quality").value;
    showGetting((await fromServer("/playground/get", { model, target, ...(quality ? { quality } : {}) })).getting);
    poll();
  } catch (problem) {
    $("found").className = "error";
    $("found").textContent = problem.message;
  }
}

async function poll() {
  clearTimeout(polling);
  try {
    const { getting } = await fromServer("/playground/get");
    if (!getting) return;
    showGetting(getting);
    if (getting.state === "getting") polling = setTimeout(poll, POLL_MS);
  } catch (problem) {
    $("status").textContent = problem.message;
    polling = setTimeout(poll, 5 * POLL_MS);
  }
}

function progressText(getting) {
  const phase = PHASES[getting.phase] ?? getting.phase;
  if (!getting.total) return phase;
  const far = getting.phase === "download" ? `${bytes(getting.done)} of ${bytes(getting.total)}` : `${getting.done} of ${getting.total}`;
  const left = getting.done && getting.phase_s > 2 ? Math.ceil((getting.phase_s / getting.done) * (getting.total - getting.done)) : 0;
  return `${phase}, ${far}${left ? `, about ${left} s left` : ""}`;
}

function showGetting(getting) {
  const going = getting.state === "getting";
  const words = { getting: progressText(getting), made: "is ready", cancelled: "was cancelled; Get goes on where it was", failed: getting.problem };
  const seen = $("getting").dataset.state;
  $("getting").hidden = false;
  $("getting").dataset.state = `${getting.state} ${getting.phase}`;
  $("getting-text").textContent = `${getting.bundle ?? getting.model}${getting.state === "made" ? " " : ": "}${words[getting.state]}`;
  $("getting-text").className = getting.state === "failed" ? "error" : "";
  $("getting-bar").hidden = $("getting-cancel").hidden = !going;
  if (getting.total) { $("getting-bar").max = getting.total; $("getting-bar").value = getting.done; } else $("getting-bar").removeAttribute("value");
  $("getting-close").hidden = going;
  $("getting-talk").hidden = getting.state !== "made";
  $("getting-talk").onclick = () => { $("getting").hidden = true; talkTo(getting.bundle); };
  // A screen reader is told of each phase, not of each step.
  if (seen !== $("getting").dataset.state) $("status").textContent = going ? (PHASES[getting.phase] ?? getting.phase) : $("getting-text").textContent;
  if (!going && seen?.startsWith("getting") && groups) look();
}

$("models-open").onclick = () => showModels($("models").hidden);
$("words").oninput = $("runs").onchange = showCards;
$("look").onsubmit = (event) => {
  event.preventDefault();
  if (!$("hub").hidden) look($("words").value.trim());
};
$("getting-cancel").onclick = async () => showGetting((await fromServer("/playground/cancel", {})).getting);
$("getting-close").onclick = () => { $("getting").hidden = true; };
