// Builds the page from its unpacked data.

const OUTCOME_CLASSES = {
  ok: "o-ok",
  format_error: "o-format",
  exception: "o-exception",
  invalid_submission: "o-invalid",
  timeout: "o-timeout",
  out_of_memory: "o-memory",
  output_flood: "o-flood",
  result_too_big: "o-big",
  killed: "o-killed",
  sandbox_error: "o-sandbox",
};

// Called with the id of an attempt when the URL's fragment changes, as by the back button. The tree section sets it.
let openAttempt = () => {};

function show(data, competition) {
  const main = document.getElementById("page");
  const outcomes = data.outcome_names.map((name, i) => ({ name, label: data.outcomes[i], className: OUTCOME_CLASSES[name] }));
  const first = data.runs[0];
  const ids = first.competitions.map((progress) => progress.id);
  const runs = data.runs
    .map((run, index) => ({ run, index, progress: run.competitions.find((progress) => progress.id === competition) }))
    .filter(({ progress }) => progress);
  const without = data.runs.filter((run) => !runs.some((one) => one.run === run));
  let offset = 0;
  for (const id of ids.slice(0, ids.indexOf(competition))) offset += data.trees[id].id.length;
  const chooser =
    ids.length > 1
      ? el("label", { class: "choose" }, "task ", el("select", { onchange: (event) => show(data, event.target.value) }, ids.map((id) => el("option", { value: id, selected: id === competition }, id))))
      : null;
  const what = data.runs.length > 1 ? data.runs.map((run) => run.label).join(" vs. ") : kindText(first.kind);
  const header = el("header", null, el("h1", null, data.runs.length > 1 ? `${first.name}: ${what}` : first.name), el("p", { class: "subtitle" }, competition ? `${competition}, ${data.runs.length > 1 ? "comparison of runs" : what}` : what), chooser);
  if (!runs.length) {
    document.documentElement.dataset.ready = "yes";
    main.replaceChildren(header, missing(data.runs.map((run) => ({ run }))) ?? "", el("p", { class: "note" }, "No data yet."));
    return;
  }
  const fragment = location.hash.slice(1);
  main.replaceChildren(
    header,
    ...[
      runs.length > 1 ? comparison(runs) : headline(runs[0].run, runs[0].progress),
      without.length ? el("p", { class: "note" }, `These runs do not have ${competition}: ${without.map((run) => run.label).join(", ")}.`) : null,
      missing(runs),
      runs[0].progress.disclosed ? el("p", { class: "disclosed" }, runs[0].progress.disclosed.text) : null,
      scores(runs),
      el("div", { class: runs.length > 1 ? null : "two" }, rewards(runs), outcomesSection(runs, outcomes)),
      runs[0].run === first ? treeSection(data, competition, first, runs[0].progress, offset, outcomes, fragment) : null,
      panels(runs),
      disclosure(runs),
      configuration(runs),
      el("footer", null, "Written by discover_jax from the files in the run directory. This page sends no network requests."),
    ].filter((part) => part !== null),
  );
  document.documentElement.dataset.ready = "yes";
}

document.body.append(tip);
addEventListener("hashchange", () => openAttempt(location.hash.slice(1)));
unpack("data").then(
  (data) => show(data, (data.runs[0].competitions[0] || { id: "" }).id),
  (error) => document.getElementById("page").replaceChildren(el("p", { class: "note" }, `Could not unpack this page's data: ${error.message}. Use a browser of 2023 or later.`)),
);
