// A real Better Auth server makes users, sessions and keys; prints its tables, and what its users know.

import { betterAuth } from "better-auth";
import { memoryAdapter } from "better-auth/adapters/memory";
import { hashPassword, verifyPassword } from "better-auth/crypto";
import { bearer } from "better-auth/plugins";
import { apiKey } from "@better-auth/api-key";

const [secret, ourHash] = process.argv.slice(2);
const address = "http://127.0.0.1:8000";
const tables = { user: [], session: [], account: [], verification: [], apikey: [] };
const auth = betterAuth({
  baseURL: address,
  secret,
  database: memoryAdapter(tables),
  emailAndPassword: { enabled: true },
  plugins: [bearer(), apiKey({ defaultPrefix: "bnp_" })],
});

async function post(path, body, cookie = "") {
  const headers = { "content-type": "application/json", origin: address, cookie };
  const answer = await auth.handler(
    new Request(`${address}/api/auth${path}`, { method: "POST", headers, body: JSON.stringify(body) }),
  );
  const set = answer.headers.getSetCookie()[0]?.split("; ")[0];
  return { ...(await answer.json()), cookie: set };
}

const known = [];
for (const name of ["Ada", "Grace"]) {
  const password = `${name}'s p\u00e4ssword`;
  const email = `${name.toLowerCase()}@example.com`;
  const { cookie, token } = await post("/sign-up/email", { name, email, password });
  const { key } = await post("/api-key/create", { name: "old" }, cookie);
  known.push({ email, password, cookie, token, key });
}
const accepts = await verifyPassword({ hash: ourHash, password: "made here" });
console.log(JSON.stringify({ tables, known, accepts, hash: await hashPassword("made there") }));
