// The details of one attempt: its facts, ancestors, children and output, and its diff to its parent.

const CHILDREN_SHOWN = 12;

// `offset`: index of the tree's first attempt among all packed attempts. `seed`: score of the seed program, the parent of the first
// attempts; null if there is none.
async function showAttempt(host, { tree, row, offset, seed, scoreName, disclosed, outcomes, lineage, choose }) {
  const packed = await programs();
  const parent = tree.parent[row];
  const own = packed.lines(offset + row);
  const from = parent >= 0 ? packed.lines(offset + parent) : null;
  const best = lineage[lineage.length - 1];
  const detail = packed.detail(offset + row);
  const stdout = packed.stdout(offset + row);
  const change = parent >= 0 && known(tree.score[row]) && known(tree.score[parent]) ? ` (${signed(tree.score[row] - tree.score[parent], disclosed)} vs. parent)` : "";
  const facts = [
    ["outcome", outcomes[tree.outcome[row]].label],
    [scoreName, `${exactScore(tree.score[row], disclosed)}${change}`],
    ["reward", score(tree.reward[row], disclosed)],
    ["sampled in", `step ${shownStep(tree.step[row])}, group ${tree.group[row] + 1}, rollout ${tree.index[row] + 1}`],
    ["length", `${count(tree.tokens[row], "token")}${tree.stop[row] ? ", truncated at the limit" : ""}`],
    ["adapter", `after ${count(tree.adapter_step[row], "update")}`],
  ];
  const family = ancestors(tree, row);
  const children = childrenOf(tree, row);
  const go = (to, text) => el("button", { class: to === row ? "go here" : to === best ? "go best" : "go", onclick: () => choose(to) }, text);
  host.dataset.id = tree.id[row];
  host.replaceChildren(
    el("h3", null, tree.id[row], row === best ? el("span", { class: "badge" }, "best") : null, row !== best && best !== undefined ? go(best, "show the best attempt") : null),
    el("dl", { class: "facts" }, facts.map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value)))),
    el(
      "p",
      { class: "family" },
      el("span", { class: "label" }, "lineage"),
      el("span", { class: "start" }, origin(tree, family[0], seed, disclosed)),
      family.map((each) => ["→ ", go(each, known(tree.score[each]) ? score(tree.score[each], disclosed) : outcomes[tree.outcome[each]].label)]),
    ),
    el(
      "p",
      { class: "family" },
      el("span", { class: "label" }, count(children.length, "child", "children")),
      children.slice(0, CHILDREN_SHOWN).map((each) => go(each, known(tree.score[each]) ? score(tree.score[each], disclosed) : outcomes[tree.outcome[each]].label)),
      children.length > CHILDREN_SHOWN ? `and ${children.length - CHILDREN_SHOWN} more` : null,
    ),
    detail ? el("div", { class: "said" }, el("h4", null, known(tree.score[row]) ? "What the checker says" : "Reason of the failure"), el("pre", null, detail)) : "",
    el("h4", null, heading(own, from, parent, tree)),
    own === null ? el("p", { class: "note" }, noProgram(tree, row, outcomes)) : from === null ? codeView(own) : diffView(from, own),
    own !== null && from !== null ? el("details", null, el("summary", null, `Whole program, ${count(own.length, "line")}`), codeView(own)) : "",
    stdout ? el("details", { class: "said" }, el("summary", null, "End of the output"), el("pre", null, stdout)) : "",
  );
}

function origin(tree, row, seed, disclosed) {
  if (tree.lost[row]) return "a parent that is not in the journal";
  return known(seed) ? `seed program ${score(seed, disclosed)}` : "no parent";
}

function heading(own, from, parent, tree) {
  if (own === null) return "Program";
  if (from !== null) return `Changes: parent ${tree.id[parent]} on the left, this program on the right`;
  return parent >= 0 ? "Program (its parent's program is not in this page)" : "Program";
}

function noProgram(tree, row, outcomes) {
  return outcomes[tree.outcome[row]].name === "format_error"
    ? "The reply has no program, or its edits do not apply."
    : "This program was left out to limit the page's size; journal.jsonl has it.";
}
