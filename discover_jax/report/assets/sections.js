// The sections of the page. Each is built only from the page's data.

const RUN_CLASSES = ["run0", "run1", "run2", "run3", "run4", "run5"];
const runClass = (index) => RUN_CLASSES[index % RUN_CLASSES.length];

function section(title, caption, ...content) {
  return el("section", null, el("h2", null, title), caption ? el("p", { class: "caption" }, caption) : null, content);
}

function last(values) {
  return values.length ? values[values.length - 1] : null;
}

const kindText = (kind) => (kind === "train" ? "test-time training" : "search without training");

// The interval of the best score.
function intervalText(progress) {
  const grade = progress.grade;
  if (grade && Array.isArray(grade.interval_95)) return `95% interval ${span(grade.interval_95)}`;
  if (known(last(progress.best_interval))) return `95% interval ${span(last(progress.best_interval))}`;
  if (grade && typeof grade.interval_95_method === "string") return grade.interval_95_method;
  return "interval unknown";
}

function headline(run, progress) {
  const disclosed = progress.disclosed;
  const valid = total(progress.outcomes.ok);
  const rollouts = last(progress.rollouts) || 0;
  const means = progress.reward_mean.filter(known);
  const planned = known(run.planned) && !run.goes_on_from ? ` of ${run.planned}` : "";
  const facts = [
    [disclosed ? `best ${disclosed.metric}` : "best score", exactScore(last(progress.best), disclosed), rollouts ? intervalText(progress) : "no program yet"],
    ["mean reward", means.length ? `${score(means[0])} → ${score(last(means))}` : MISSING, "first to last step, including failures"],
    ["valid programs", percent(valid, rollouts), `${valid.toLocaleString("en")} of ${count(rollouts, "rollout")}`],
    ["steps", `${progress.steps.length}${planned}`, kindText(run.kind)],
  ];
  if (progress.gains) {
    const [better, beyond] = progress.gains;
    facts.push(["better than their parent", count(better, "program"), better ? `${beyond.toLocaleString("en")} by more than the noise of the rows (95%)` : "no gain"]);
  }
  const grade = progress.grade;
  if (grade && disclosed && disclosed.reward === "holdout" && typeof grade.private_score === "number") {
    const interval = Array.isArray(grade.private_interval_95) ? `; 95% interval ${span(grade.private_interval_95)}` : "";
    facts.splice(1, 0, ["score on the private answers", score(grade.private_score), `not used for selection${interval}`]);
  }
  const chosen = progress.chosen;
  if (chosen && typeof chosen.retested_score === "number") {
    const interval = Array.isArray(chosen.retested_interval_95) ? `; 95% interval ${span(chosen.retested_interval_95)}` : "";
    const exact = isExact(disclosed);
    const rows = exact ? ` in ${count(chosen.retested_rows, "evaluation")}` : ` on ${count(chosen.retested_rows, "row")} that gave no reward`;
    const hidden = !exact && typeof chosen.private_score === "number" ? `; ${score(chosen.private_score)} on the private answers` : "";
    const before = typeof chosen.score === "number" ? `; ${score(chosen.score, disclosed)} before` : "";
    facts.splice(1, 0, [`chosen program, ${chosen.id}`, score(chosen.retested_score, disclosed), `retested${rows}${interval}${before}${hidden}`]);
  }
  return el("div", { class: "headline" }, facts.map(([name, value, more]) => el("div", null, el("span", { class: "name" }, name), el("span", { class: "value" }, value), el("span", { class: "more" }, more))));
}

// The headline's numbers for several runs, one row per run.
function comparison(runs) {
  const head = ["run", "steps", "rollouts", "best", "95% interval", "mean reward, first to last step", "valid"];
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
            score(last(progress.best), progress.disclosed),
            intervalText(progress).replace("95% interval ", ""),
            means.length ? `${score(means[0])} → ${score(last(means))}` : MISSING,
            percent(total(progress.outcomes.ok), rollouts),
          ];
          return el("tr", null, cells.map((cell) => el("td", null, cell)));
        }),
      ),
    ),
  );
}

// The result of `draw` for each run. If there are several runs, each has its name as a heading.
function perRun(runs, draw) {
  if (runs.length === 1) return draw(runs[0]);
  return el("div", { class: "two" }, runs.map((one) => el("div", { class: "one" }, el("h3", null, one.run.label), draw(one))));
}

// The score of the seed program, from which all runs that are compared may start, as a threshold.
function seedLines(runs) {
  const found = [...new Set(runs.map(({ progress }) => progress.seed).filter(known))];
  return found.map((seed) => ["seed program", seed]);
}

function scores(runs) {
  const disclosed = runs[0].progress.disclosed;
  const single = runs.length === 1;
  // If the runs have different numbers of rollouts per step, the x axis shows rollouts.
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
          name: single ? "mean of valid" : `${run.label}: mean`,
          values: progress.mean,
          low: single ? progress.mean_interval.map((i) => i && i[0]) : null,
          high: single ? progress.mean_interval.map((i) => i && i[1]) : null,
          className: single ? "mean" : `${runClass(index)} dashed`,
        },
      ],
    }));
  if (!series.length) return section("Scores", null, el("p", { class: "note" }, "No step has finished yet."));
  const notes = [];
  if (!disclosed) notes.push(el("p", { class: "note" }, "No bands: disclosure.json is missing, so the metric and its number of rows are unknown."));
  else if (disclosed.reward === "evaluate") notes.push(el("p", { class: "note" }, "No bands: evaluate() checks each solution itself, not a sample of rows."));
  else if (disclosed.share_of_rows) {
    notes.push(
      el("p", { class: "note" }, `Bands: 95% interval (Wilson) of one program with that score on ${count(disclosed.rows, "row")}. The interval ignores selection: the best program was chosen among many on the same rows, so its true score is probably worse.`),
    );
  } else if (disclosed.share_of_rows === false) {
    const grade = runs[0].progress.grade;
    const own = grade && Array.isArray(grade.interval_95) ? ` Its interval is ${span(grade.interval_95)} (${grade.interval_95_method}; ${count(grade.rows, "row")}).` : "";
    notes.push(el("p", { class: "note" }, `No bands: ${disclosed.metric} is not a proportion of rows, so an interval needs a program's submission, and a run keeps only the best program's.${own}`));
  } else notes.push(el("p", { class: "note" }, "No bands: disclosure.json, written by an older version, does not say whether the metric is a proportion of rows."));
  const seeds = seedLines(runs);
  if (disclosed && disclosed.thresholds.length) notes.push(el("p", { class: "note caveat" }, `Grey lines: ${isExact(disclosed) ? "published scores," : "thresholds"} ${disclosed.source}. ${disclosed.note}`));
  else if (disclosed) notes.push(el("p", { class: "note" }, `No leaderboard lines. ${disclosed.note}`));
  if (seeds.length) notes.push(el("p", { class: "note" }, "The search started from the seed program."));
  const measured = disclosed && disclosed.reward === "evaluate" ? "checked by evaluate()" : disclosed ? `on the ${count(disclosed.rows, "row")} of the reward` : "";
  const caption = disclosed ? `Score: ${disclosed.metric} ${measured}; ${disclosed.higher_is_better ? "higher" : "lower"} is better. ${single ? "A program with a score is valid." : "Solid: best so far. Dashed: mean of the step's valid programs."}` : null;
  return section("Scores", caption, scoreChart(series, [...(disclosed ? disclosed.thresholds : []), ...seeds], byRollouts ? "rollouts" : "step", `Best and mean score by ${byRollouts ? "number of rollouts" : "step"}`, disclosed), notes);
}

function rewards(runs) {
  const tallest = Math.max(1, ...runs.flatMap(({ progress }) => progress.rewards.counts.flat()));
  return section(
    "Rewards",
    "Histogram of the rewards of valid programs in each step: darker cells have more programs. The line is their mean.",
    perRun(runs, ({ progress }) => [
      progress.steps.length ? rewardChart(progress.steps.map(shownStep), progress.rewards, progress.valid_reward_mean, progress.reward_mean, tallest) : null,
      progress.rewards.below ? el("p", { class: "note" }, `The lowest row of cells includes ${count(progress.rewards.below, "program")} with a reward below ${score(progress.rewards.edges[0])}.`) : null,
    ]),
  );
}

function outcomesSection(runs, outcomes) {
  return section(
    "Outcomes",
    null,
    perRun(runs, ({ progress }) => {
      const parts = outcomes
        .map((outcome) => ({ label: outcome.label, className: outcome.className, values: progress.outcomes[outcome.name] }))
        .filter((part) => total(part.values) > 0);
      return [
        el("ul", { class: "key" }, parts.map((part) => el("li", null, el("i", { class: `swatch ${part.className}` }), `${part.label} ${total(part.values).toLocaleString("en")}`))),
        progress.steps.length ? stackChart(progress.steps.map(shownStep), parts, { label: "Outcomes of the rollouts of each step", text: (v) => v.toLocaleString("en") }) : null,
      ];
    }),
  );
}

// The tree, and the details of the selected attempt. `start` is the id of the attempt that is selected first.
function treeSection(data, competition, run, progress, offset, outcomes, start) {
  const tree = data.trees[competition];
  if (!tree || !tree.id.length) return section("Programs", null, el("p", { class: "note" }, "The journal has no attempts yet."));
  const lineage = progress.lineage.map((id) => tree.id.indexOf(id));
  const disclosed = progress.disclosed;
  const scoreName = disclosed ? disclosed.metric : "score";
  const details = el("div", { class: "attempt", id: "attempt", "aria-live": "polite" });
  const select = (row) => {
    chart.mark(row);
    showAttempt(details, { tree, row, offset, seed: progress.seed, scoreName, disclosed, outcomes, lineage, choose }).catch((error) => {
      details.replaceChildren(el("p", { class: "note" }, `Could not unpack the programs: ${error.message}`));
    });
  };
  const choose = (row) => {
    location.hash = tree.id[row];
    select(row);
  };
  const chart = treeChart({
    tree,
    lineage,
    disclosed,
    outcomes,
    describe: `${tree.id.length} attempts by step and ${scoreName}, with edges to their parents`,
    choose,
  });
  openAttempt = (id) => {
    const row = tree.id.indexOf(id);
    if (row >= 0 && details.dataset.id !== id) choose(row);
  };
  const first = tree.id.indexOf(start);
  select(first >= 0 ? first : lineage.length ? last(lineage) : 0);
  const leftOut = el("p", { class: "note" });
  programs().then(
    (packed) => {
      if (packed.leftOut) leftOut.textContent = `${count(packed.leftOut, "program")} left out to limit the page's size; journal.jsonl has them.`;
    },
    () => {},
  );
  const notes = [];
  if (chart.beyond) notes.push(el("p", { class: "note" }, `${count(chart.beyond, "program")} with a score worse than ${score(chart.edge, disclosed)} ${chart.beyond === 1 ? "is" : "are"} drawn at the chart's edge.`));
  if (run.goes_on_from) notes.push(el("p", { class: "note" }, `Steps before ${(run.metric_steps[0] ?? 0) + 1} belong to the run that this one continues.`));
  return section(
    "Programs",
    "Each dot is an attempt at its step and score, with an edge to its parent. The best program's ancestors are bold. Select a dot, or use the arrow keys, to see its changes. Steps count from 1, ids from 0.",
    chart.host,
    notes,
    details,
    leftOut,
  );
}

function panels(runs) {
  const names = runs[0].run.panels.map((panel) => panel.title);
  return section(
    "Update and sampling",
    runs.length > 1 ? "From each run's metrics.jsonl. Advantages: the maximum. Log-probability gap: the mean." : "From metrics.jsonl; docs/metrics.md explains the metrics.",
    el("div", { class: "panels" }, names.map((_, panelIndex) => onePanel(runs, panelIndex))),
  );
}

function onePanel(runs, panelIndex) {
  const panel = runs[0].run.panels[panelIndex];
  const unit = panel.unit ? ` (${panel.unit})` : "";
  const label = `${panel.title}${unit} by step`;
  const parts = runs.map(({ run, index }) => ({ run, index, panel: run.panels[panelIndex], xs: run.metric_steps.map(shownStep) }));
  const present = parts.filter((part) => !part.panel.absent && part.xs.length);
  const absent = parts.filter((part) => part.panel.absent).map((part) => el("p", { class: "note absent" }, runs.length > 1 ? `${part.run.label}: ${part.panel.absent}` : part.panel.absent));
  const content = [];
  if (runs.length > 1) {
    const sum = (part) => (panel.form === "stack" ? part.xs.map((_, i) => total(part.panel.series.map((one) => one.values[i] || 0))) : part.panel.series[panel.form === "range" ? 2 : 0].values);
    if (present.length) content.push(lineChart(present.map((part) => ({ xs: part.xs, values: sum(part), label: part.run.label, className: runClass(part.index) })), { label }));
  } else if (present.length && panel.form === "stack") {
    const series = panel.series.map((one, i) => ({ label: one.label, className: `s${i}`, values: one.values }));
    content.push(
      stackChart(present[0].xs, series, { height: 150, unit: " s", label, margin: { left: 56 }, text: (v) => number(v, 3) }),
      el("ul", { class: "key" }, series.filter((one) => one.values.some(known)).map((one) => el("li", null, el("i", { class: `swatch ${one.className}` }), one.label))),
    );
  } else if (present.length) {
    const [first, low, high] = panel.series;
    const ranged = panel.form === "range";
    const lines = (ranged ? [first] : panel.series).filter((one) => one.values.some(known));
    content.push(
      lineChart(
        lines.map((one, i) => ({ xs: present[0].xs, values: one.values, label: one.label, className: `s${i}` })),
        { label, range: ranged ? { low: low.values, high: high.values } : null },
      ),
    );
  }
  const meaning = panel.form === "stack" ? "time of the parts of a step" : panel.form === "range" ? (runs.length > 1 ? panel.series[2].meaning : "mean, with the range from minimum to maximum") : panel.series[0].meaning;
  return el("div", { class: "panel" }, el("h3", null, panel.title, el("span", { class: "unit" }, unit)), el("p", { class: "note" }, meaning), content, absent);
}

function disclosure(runs) {
  return section(
    "Disclosure",
    null,
    runs.map(({ run, progress }) => {
      const disclosed = progress.disclosed;
      const lines = [];
      if (disclosed) {
        lines.push(disclosed.text);
        lines.push(`Grader: ${disclosed.grader}. ${disclosed.reward === "evaluate" ? "There are no private answers." : `The search used the private answers: ${disclosed.reward === "grade" ? "yes" : "no"}.`}`);
      } else lines.push("disclosure.json is missing, so the source of the reward is unknown.");
      for (const line of run.isolation) lines.push(`Programs ran in ${line}`);
      if (run.isolated === false) lines.push("Weaker isolation: it is unknown what programs read or changed on this machine.");
      if (run.goes_on_from) lines.push(`This run continues ${run.goes_on_from.run} after ${run.goes_on_from.steps} steps.`);
      return [runs.length > 1 ? el("h3", null, run.label) : null, el("ul", { class: "plain" }, lines.map((line) => el("li", null, line)))];
    }),
  );
}

function missing(runs) {
  const lines = runs.flatMap(({ run }) => run.missing.map((line) => (runs.length > 1 ? `${run.label}: ${line}` : line)));
  return lines.length ? el("aside", { class: "missing" }, el("strong", null, "Missing from the run directory"), el("ul", null, lines.map((line) => el("li", null, line)))) : null;
}

function configuration(runs) {
  const row = ([name, value, meaning]) => el("tr", null, el("td", null, el("code", null, name)), el("td", null, el("code", null, value)), el("td", { class: "meaning" }, meaning));
  if (runs.length > 1) {
    const tables = runs.map(({ run }) => new Map(run.config.map(([name, value]) => [name, value])));
    const names = [...new Set(tables.flatMap((table) => [...table.keys()]))].filter((name) => new Set(tables.map((table) => table.get(name))).size > 1);
    const head = el("tr", null, el("th", null, "setting"), runs.map(({ run }) => el("th", null, run.label)));
    const lines = names.map((name) => el("tr", null, el("td", null, el("code", null, name)), tables.map((table) => el("td", null, el("code", null, table.get(name) ?? "not in this config")))));
    return section("Config differences", null, names.length ? el("div", { class: "scroll" }, el("table", null, head, lines)) : el("p", { class: "note" }, "All settings are equal."));
  }
  const all = runs[0].run.config;
  const changed = all.filter((entry) => entry[3]);
  const rest = all.filter((entry) => !entry[3]);
  return section(
    "Config",
    "Settings that differ from their defaults; the others are below.",
    el("div", { class: "scroll" }, el("table", { class: "config" }, changed.map(row))),
    el("details", null, el("summary", null, count(rest.length, "setting at its default", "settings at their defaults")), el("div", { class: "scroll" }, el("table", { class: "config" }, rest.map(row)))),
  );
}
