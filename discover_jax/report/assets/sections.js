// The sections of the page, each made from data alone.

const RUN_CLASSES = ["run0", "run1", "run2", "run3", "run4", "run5"];
const runClass = (index) => RUN_CLASSES[index % RUN_CLASSES.length];

function section(title, caption, ...content) {
  return el("section", null, el("h2", null, title), caption ? el("p", { class: "caption" }, caption) : null, content);
}

function last(values) {
  return values.length ? values[values.length - 1] : null;
}

const verb = (kind) => (kind === "train" ? "test-time training" : "search without training");

// What is known of the best score: its interval, and of which rows.
function sureness(progress) {
  const grade = progress.grade;
  if (grade && Array.isArray(grade.interval_95)) return `95% interval ${span(grade.interval_95)}`;
  if (known(last(progress.best_interval))) return `95% interval ${span(last(progress.best_interval))}`;
  if (grade && typeof grade.interval_95_method === "string") return grade.interval_95_method;
  return "its interval is not known";
}

function opening(run, progress) {
  const told = progress.disclosed;
  const fates = progress.fates;
  const rollouts = last(progress.rollouts) || 0;
  const means = progress.reward_mean.filter(known);
  const planned = known(run.planned) && !run.goes_on_from ? ` of ${run.planned}` : "";
  const facts = [
    [told ? `best ${told.metric}` : "best score", score(last(progress.best)), rollouts ? sureness(progress) : "no program yet"],
    ["mean reward", means.length ? `${score(means[0])} → ${score(last(means))}` : MISSING, "first step to last, failures included"],
    ["programs that scored", percent(total(fates.ok), rollouts), `${total(fates.ok).toLocaleString("en")} of ${count(rollouts, "rollout")}`],
    ["steps", `${progress.steps.length}${planned}`, verb(run.kind)],
  ];
  const grade = progress.grade;
  if (grade && told && told.reward === "holdout" && typeof grade.private_score === "number") {
    const sure = Array.isArray(grade.private_interval_95) ? `; 95% interval ${span(grade.private_interval_95)}` : "";
    facts.splice(1, 0, ["on the private answers", score(grade.private_score), `chose nothing${sure}`]);
  }
  return el("div", { class: "headline" }, facts.map(([name, value, more]) => el("div", null, el("span", { class: "name" }, name), el("span", { class: "value" }, value), el("span", { class: "more" }, more))));
}

// The same numbers for several runs, a row each.
function comparison(runs) {
  const head = ["run", "steps", "rollouts", "best", "interval", "mean reward, first to last", "scored"];
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      { class: "runs" },
      el("thead", null, el("tr", null, head.map((name) => el("th", null, name)))),
      el(
        "tbody",
        null,
        runs.map(({ run, progress, index }) => {
          const means = progress.reward_mean.filter(known);
          const rollouts = last(progress.rollouts) || 0;
          const cells = [
            [el("i", { class: `swatch ${runClass(index)}` }), run.label],
            String(progress.steps.length),
            rollouts.toLocaleString("en"),
            score(last(progress.best)),
            sureness(progress).replace("95% interval ", ""),
            means.length ? `${score(means[0])} → ${score(last(means))}` : MISSING,
            percent(total(progress.fates.ok), rollouts),
          ];
          return el("tr", null, cells.map((cell) => el("td", null, cell)));
        }),
      ),
    ),
  );
}

// What `draw` gives for each run, with its name above it where there are several.
function perRun(runs, draw) {
  if (runs.length === 1) return draw(runs[0]);
  return el("div", { class: "two" }, runs.map((one) => el("div", { class: "one" }, el("h3", null, one.run.label), draw(one))));
}

function scores(runs) {
  const told = runs[0].progress.disclosed;
  const single = runs.length === 1;
  // Runs with unequal steps are compared at equal numbers of rollouts.
  const perStep = new Set(runs.map(({ progress }) => (progress.steps.length ? last(progress.rollouts) / progress.steps.length : 0)));
  const byRollouts = !single && perStep.size > 1;
  const series = runs
    .filter(({ progress }) => progress.steps.length)
    .map(({ run, progress, index }) => ({
      xs: byRollouts ? progress.rollouts : progress.steps.map(shownStep),
      lines: [
        {
          name: single ? "best so far" : `${run.label}: best`,
          values: progress.best,
          low: progress.best_interval.map((i) => i && i[0]),
          high: progress.best_interval.map((i) => i && i[1]),
          className: single ? "best" : runClass(index),
        },
        {
          name: single ? "mean of the valid" : `${run.label}: mean`,
          values: progress.mean,
          low: single ? progress.mean_interval.map((i) => i && i[0]) : null,
          high: single ? progress.mean_interval.map((i) => i && i[1]) : null,
          className: single ? "mean" : `${runClass(index)} dashed`,
        },
      ],
    }));
  if (!series.length) return section("Scores", null, el("p", { class: "note" }, "No step has been done yet."));
  const notes = [];
  if (!told) notes.push(el("p", { class: "note" }, "disclosure.json is missing, so the rows behind scores and their interval are not known."));
  else if (told.share_of_rows) {
    notes.push(
      el("p", { class: "note" }, `Bands: 95% interval (Wilson) of one program with that score on ${count(told.rows, "row")}. It is about the rows alone: that the best was chosen among many on the same rows is not in it, so the best lies on the lucky side.`),
    );
  } else if (told.share_of_rows === false) {
    const grade = runs[0].progress.grade;
    const own = grade && Array.isArray(grade.interval_95) ? ` The best program's is ${span(grade.interval_95)} (${grade.interval_95_method}; ${count(grade.rows, "row")}).` : "";
    notes.push(el("p", { class: "note" }, `No bands: ${told.metric} is no share of rows, so an interval needs each program's submission, and a run keeps the best one's alone.${own}`));
  } else notes.push(el("p", { class: "note" }, "No bands: disclosure.json does not say whether the metric is a share of rows (an older version wrote it)."));
  if (told && told.thresholds.length) notes.push(el("p", { class: "note caveat" }, `Grey lines: thresholds ${told.source}. ${told.note}`));
  else if (told) notes.push(el("p", { class: "note" }, `No leaderboard lines. ${told.note}`));
  const caption = told ? `Score: ${told.metric} on the ${count(told.rows, "row")} behind the reward, ${told.higher_is_better ? "higher" : "lower"} is better. ${single ? "Valid are the programs that scored." : "Solid: best so far. Dashed: mean of the step's valid programs."}` : null;
  return section("Scores", caption, scoreChart(series, told ? told.thresholds : [], byRollouts ? "rollouts" : "step", "Best and mean score by step"), notes);
}

function rewards(runs) {
  const tallest = Math.max(1, ...runs.flatMap(({ progress }) => progress.rewards.counts.flat()));
  return section(
    "Rewards",
    "How the rewards of the programs that scored are spread in each step: the darker, the more. The line is their mean.",
    perRun(runs, ({ progress }) => [
      progress.steps.length ? rewardChart(progress.steps.map(shownStep), progress.rewards, progress.valid_reward_mean, progress.reward_mean, tallest) : null,
      progress.rewards.below ? el("p", { class: "note" }, `The lowest row of cells also holds ${count(progress.rewards.below, "program")} with a reward below ${score(progress.rewards.edges[0])}.`) : null,
    ]),
  );
}

function fates(runs, outcomes) {
  return section(
    "Outcomes",
    null,
    perRun(runs, ({ progress }) => {
      const parts = outcomes
        .map((outcome) => ({ label: outcome.label, className: outcome.className, values: progress.fates[outcome.name] }))
        .filter((part) => total(part.values) > 0);
      return [
        el("ul", { class: "key" }, parts.map((part) => el("li", null, el("i", { class: `swatch ${part.className}` }), `${part.label} ${total(part.values).toLocaleString("en")}`))),
        progress.steps.length ? stackChart(progress.steps.map(shownStep), parts, { label: "Outcomes of the rollouts of each step", text: (v) => v.toLocaleString("en") }) : null,
      ];
    }),
  );
}

// The tree with the details of what is chosen in it; `start` is the id to begin with.
function treeSection(data, competition, run, progress, offset, outcomes, start) {
  const tree = data.trees[competition];
  if (!tree || !tree.id.length) return section("Programs", null, el("p", { class: "note" }, "The journal holds no attempt yet."));
  const lineage = progress.lineage.map((id) => tree.id.indexOf(id));
  const told = progress.disclosed;
  const scoreName = told ? told.metric : "score";
  const place = el("div", { class: "attempt", id: "attempt", "aria-live": "polite" });
  const choose = (row) => {
    chart.mark(row);
    location.hash = tree.id[row];
    showAttempt(place, { tree, row, offset, scoreName, outcomes, lineage, choose }).catch((error) => {
      place.replaceChildren(el("p", { class: "note" }, `The programs could not be unpacked: ${error.message}`));
    });
  };
  const chart = treeChart({
    tree,
    lineage,
    higher: told ? told.higher_is_better : null,
    scoreName,
    outcomes,
    describe: `${tree.id.length} attempts by step and ${scoreName}, joined to their parents`,
    choose,
  });
  addressed = (id) => {
    const row = tree.id.indexOf(id);
    if (row >= 0 && place.dataset.id !== id) choose(row);
  };
  const first = tree.id.indexOf(start);
  const begin = first >= 0 ? first : lineage.length ? last(lineage) : 0;
  chart.mark(begin);
  showAttempt(place, { tree, row: begin, offset, scoreName, outcomes, lineage, choose }).catch((error) => {
    place.replaceChildren(el("p", { class: "note" }, `The programs could not be unpacked: ${error.message}`));
  });
  const room = el("p", { class: "note" });
  programs().then(
    (packed) => {
      if (packed.leftOut) room.textContent = `${count(packed.leftOut, "program")} found no room in this page; journal.jsonl has them.`;
    },
    () => {},
  );
  const notes = [];
  if (chart.beyond) notes.push(el("p", { class: "note" }, `${count(chart.beyond, "program")} scored worse than ${score(chart.edge)} and ${chart.beyond === 1 ? "lies" : "lie"} on the chart's edge.`));
  if (run.goes_on_from) notes.push(el("p", { class: "note" }, `Steps before ${(run.metric_steps[0] ?? 0) + 1} are those of the run that this one goes on from.`));
  return section(
    "Programs",
    "Each dot is a program at its step and score, joined to its parent; the best one's ancestors are drawn bold. Choose a dot, or walk with the arrow keys, to see what it changed. Steps count from 1, ids from 0.",
    chart.host,
    notes,
    place,
    room,
  );
}

function panels(runs) {
  const names = runs[0].run.panels.map((panel) => panel.title);
  return section(
    "Update and sampling",
    runs.length > 1 ? "From each run's metrics.jsonl; of advantages the highest, of log-probability gaps the mean." : "From metrics.jsonl; names and units are those of docs/metrics.md.",
    el("div", { class: "panels" }, names.map((_, place) => onePanel(runs, place))),
  );
}

function onePanel(runs, place) {
  const panel = runs[0].run.panels[place];
  const unit = panel.unit ? ` (${panel.unit})` : "";
  const label = `${panel.title}${unit} by step`;
  const parts = runs.map(({ run, index }) => ({ run, index, panel: run.panels[place], xs: run.metric_steps.map(shownStep) }));
  const there = parts.filter((part) => !part.panel.absent && part.xs.length);
  const absent = parts.filter((part) => part.panel.absent).map((part) => el("p", { class: "note absent" }, runs.length > 1 ? `${part.run.label}: ${part.panel.absent}` : part.panel.absent));
  const content = [];
  if (runs.length > 1) {
    const sum = (part) => (panel.form === "stack" ? part.xs.map((_, i) => total(part.panel.series.map((one) => one.values[i] || 0))) : part.panel.series[panel.form === "range" ? 2 : 0].values);
    if (there.length) content.push(lineChart(there.map((part) => ({ xs: part.xs, values: sum(part), label: part.run.label, className: runClass(part.index) })), { label }));
  } else if (there.length && panel.form === "stack") {
    const series = panel.series.map((one, i) => ({ label: one.label, className: `s${i}`, values: one.values }));
    content.push(
      stackChart(there[0].xs, series, { height: 150, unit: " s", label, margin: { left: 56 }, text: (v) => number(v, 3) }),
      el("ul", { class: "key" }, series.filter((one) => one.values.some(known)).map((one) => el("li", null, el("i", { class: `swatch ${one.className}` }), one.label))),
    );
  } else if (there.length) {
    const [first, low, high] = panel.series;
    const ranged = panel.form === "range";
    const lines = (ranged ? [first] : panel.series).filter((one) => one.values.some(known));
    content.push(
      lineChart(
        lines.map((one, i) => ({ xs: there[0].xs, values: one.values, label: one.label, className: `s${i}` })),
        { label, range: ranged ? { low: low.values, high: high.values } : null },
      ),
    );
  }
  const meaning = panel.form === "stack" ? "where the time of a step went" : panel.form === "range" ? (runs.length > 1 ? panel.series[2].meaning : "mean, and from lowest to highest") : panel.series[0].meaning;
  return el("div", { class: "panel" }, el("h3", null, panel.title, el("span", { class: "unit" }, unit)), el("p", { class: "note" }, meaning), content, absent);
}

function disclosure(runs) {
  return section(
    "Disclosure",
    null,
    runs.map(({ run, progress }) => {
      const told = progress.disclosed;
      const lines = [];
      if (told) {
        lines.push(told.text);
        lines.push(`Grader: ${told.grader}. Private answers reached the search: ${told.reward === "grade" ? "yes" : "no"}.`);
      } else lines.push("There is no disclosure.json: what signal reached the search is not known.");
      for (const line of run.isolation) lines.push(`Programs ran in ${line}`);
      if (run.isolated === false) lines.push("Weaker isolation: what programs did to the machine, and what they read, is not known.");
      if (run.goes_on_from) lines.push(`Goes on from ${run.goes_on_from.run}, after ${run.goes_on_from.steps} steps.`);
      return [runs.length > 1 ? el("h3", null, run.label) : null, el("ul", { class: "plain" }, lines.map((line) => el("li", null, line)))];
    }),
  );
}

function missing(runs) {
  const lines = runs.flatMap(({ run }) => run.missing.map((line) => (runs.length > 1 ? `${run.label}: ${line}` : line)));
  return lines.length ? el("aside", { class: "missing" }, el("strong", null, "Missing from the run's folder"), el("ul", null, lines.map((line) => el("li", null, line)))) : null;
}

function configuration(runs) {
  const row = ([name, value, meaning]) => el("tr", null, el("td", null, el("code", null, name)), el("td", null, el("code", null, value)), el("td", { class: "meaning" }, meaning));
  if (runs.length > 1) {
    const tables = runs.map(({ run }) => new Map(run.config.map(([name, value]) => [name, value])));
    const names = [...new Set(tables.flatMap((table) => [...table.keys()]))].filter((name) => new Set(tables.map((table) => table.get(name))).size > 1);
    const head = el("tr", null, el("th", null, "setting"), runs.map(({ run }) => el("th", null, run.label)));
    const lines = names.map((name) => el("tr", null, el("td", null, el("code", null, name)), tables.map((table) => el("td", null, el("code", null, table.get(name) ?? "no such setting")))));
    return section("Where the configs differ", null, names.length ? el("div", { class: "scroll" }, el("table", null, head, lines)) : el("p", { class: "note" }, "All settings are equal."));
  }
  const all = runs[0].run.config;
  const changed = all.filter((entry) => entry[3]);
  const rest = all.filter((entry) => !entry[3]);
  return section(
    "Config",
    "Settings that are not the default's; the others below.",
    el("div", { class: "scroll" }, el("table", { class: "config" }, changed.map(row))),
    el("details", null, el("summary", null, count(rest.length, "setting at its default", "settings at their defaults")), el("div", { class: "scroll" }, el("table", { class: "config" }, rest.map(row)))),
  );
}
