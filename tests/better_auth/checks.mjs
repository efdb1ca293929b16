// Runs checks one after the other, and reports each as a line of JSON. Asks the test that started it for favours.

import { createInterface } from "node:readline";

const answers = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

function tell(line) {
  process.stdout.write(JSON.stringify(line) + "\n");
}

export async function check(name, assertion) {
  try {
    await assertion();
    tell({ check: name, ok: true });
  } catch (error) {
    tell({ check: name, ok: false, why: String(error?.message ?? error).slice(0, 800) });
  }
}

// "advance" moves the server's clock by so many seconds; "mail" gives the newest mail.
export async function ask(what, value = null) {
  tell({ ask: what, value });
  return JSON.parse((await answers.next()).value);
}

export function done() {
  tell({ done: true });
  process.exit(0);
}
