// Packed data: gzip in base64, decompressed by the browser.

async function unpack(id) {
  const text = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

let unpacking = null;

// Programs and outputs, unpacked at the first call.
function programs() {
  unpacking = unpacking || unpack("programs").then((packed) => new Programs(packed));
  return unpacking;
}

// Reads the format that report/program_table.py writes.
class Programs {
  constructor(packed) {
    this.packed = packed;
    this.built = new Map();
    this.leftOut = packed.left_out;
  }

  // Lines of an attempt's program; null if the page does not have it.
  lines(row) {
    const program = this.packed.rows[row][0];
    return program < 0 ? null : this.build(program);
  }

  detail(row) {
    return this.text(this.packed.rows[row][1]);
  }

  stdout(row) {
    return this.text(this.packed.rows[row][2]);
  }

  text(index) {
    return index < 0 ? "" : this.packed.texts[index];
  }

  build(program) {
    const chain = [];
    for (let at = program; at >= 0 && !this.built.has(at); at = this.packed.programs[at][0]) chain.push(at);
    for (const at of chain.reverse()) {
      const [base, ...ops] = this.packed.programs[at];
      const from = base < 0 ? [] : this.built.get(base);
      const lines = [];
      for (let i = 0; i < ops.length; i += 1) {
        if (ops[i] >= 0) {
          lines.push(this.packed.lines[ops[i]]);
        } else {
          const first = -ops[i] - 1;
          i += 1;
          for (let j = 0; j < ops[i]; j += 1) lines.push(from[first + j]);
        }
      }
      this.built.set(at, lines);
    }
    return this.built.get(program);
  }
}
