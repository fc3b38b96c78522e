// What is known of one attempt: its family, what it printed, and what it changed in its parent.

const CHILDREN_SHOWN = 12;

// `offset`: of the tree's first attempt among all packed ones.
async function showAttempt(place, { tree, row, offset, scoreName, outcomes, lineage, choose }) {
  const packed = await programs();
  const parent = tree.parent[row];
  const own = packed.lines(offset + row);
  const from = parent >= 0 ? packed.lines(offset + parent) : null;
  const best = lineage[lineage.length - 1];
  const detail = packed.detail(offset + row);
  const stdout = packed.stdout(offset + row);
  const change = parent >= 0 && known(tree.score[row]) && known(tree.score[parent]) ? ` (${signed(tree.score[row] - tree.score[parent])} on its parent)` : "";
  const facts = [
    ["outcome", outcomes[tree.outcome[row]].label],
    [scoreName, `${score(tree.score[row])}${change}`],
    ["reward", score(tree.reward[row])],
    ["written at", `step ${shownStep(tree.step[row])}, group ${tree.group[row] + 1}, rollout ${tree.index[row] + 1}`],
    ["length", `${count(tree.tokens[row], "token")}${tree.stop[row] ? ", cut at the limit" : ""}`],
    ["adapter", `${count(tree.adapter_step[row], "update")} before`],
  ];
  const family = ancestors(tree, row);
  const children = childrenOf(tree, row);
  const go = (to, text) => el("button", { class: to === row ? "go here" : to === best ? "go best" : "go", onclick: () => choose(to) }, text);
  place.dataset.id = tree.id[row];
  place.replaceChildren(
    el("h3", null, tree.id[row], row === best ? el("span", { class: "badge" }, "best") : null, row !== best && best !== undefined ? go(best, "show the best") : null),
    el("dl", { class: "facts" }, facts.map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value)))),
    el(
      "p",
      { class: "family" },
      el("span", { class: "label" }, "lineage"),
      el("span", { class: "start" }, origin(tree, family[0])),
      family.map((each) => ["→ ", go(each, known(tree.score[each]) ? score(tree.score[each]) : outcomes[tree.outcome[each]].label)]),
    ),
    el(
      "p",
      { class: "family" },
      el("span", { class: "label" }, count(children.length, "child", "children")),
      children.slice(0, CHILDREN_SHOWN).map((each) => go(each, known(tree.score[each]) ? score(tree.score[each]) : outcomes[tree.outcome[each]].label)),
      children.length > CHILDREN_SHOWN ? `and ${children.length - CHILDREN_SHOWN} more` : null,
    ),
    detail ? el("div", { class: "said" }, el("h4", null, "Why it has no score"), el("pre", null, detail)) : "",
    el("h4", null, heading(own, from, parent, tree)),
    own === null ? el("p", { class: "note" }, noProgram(tree, row, outcomes)) : from === null ? codeView(own) : diffView(from, own),
    own !== null && from !== null ? el("details", null, el("summary", null, `The whole program, ${count(own.length, "line")}`), codeView(own)) : "",
    stdout ? el("details", { class: "said" }, el("summary", null, "The end of what it printed"), el("pre", null, stdout)) : "",
  );
}

function origin(tree, row) {
  return tree.lost[row] ? "a parent that is not in the journal" : "written from nothing";
}

function heading(own, from, parent, tree) {
  if (own === null) return "Program";
  if (from !== null) return `What it changed: ${tree.id[parent]} on the left, this program on the right`;
  return parent >= 0 ? "Program (its parent's is not in this page)" : "Program";
}

function noProgram(tree, row, outcomes) {
  return outcomes[tree.outcome[row]].name === "format_error"
    ? "The reply holds no program."
    : "There was no room for this program in the page; journal.jsonl has it.";
}
