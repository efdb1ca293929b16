// The official client, unchanged, against the server. Arguments: the package of the client, and the server's address.

import assert from "node:assert/strict";
import { browser } from "./browser.mjs";
import { ask, check, done } from "./checks.mjs";

const [packageName, address] = process.argv.slice(2);
// As much of a page as the client asks for: it reads sessions by itself on pages only, and goes where it is sent.
globalThis.window = { location: { href: address, origin: address } };
globalThis.localStorage = { setItem() {} };
const { createAuthClient } = await import(`${packageName}/client`);
const { inferAdditionalFields, ...plugins } = await import(`${packageName}/client/plugins`);
const apiKeyClient = plugins.apiKeyClient ?? (await import("@better-auth/api-key/client")).apiKeyClient;
const isOld = packageName !== "better-auth";

const DAY_S = 24 * 3600;
const email = `ada.${packageName}@example.com`;
const password = "correct horse battery";
let current = password;

function newClient(origin = address, options = {}) {
  const window = browser(origin, options);
  const client = createAuthClient({
    baseURL: address,
    plugins: [apiKeyClient()],
    fetchOptions: { customFetchImpl: window.fetch, retry: 0 },
  });
  return { ...window, client };
}

function fine({ data, error }) {
  assert.equal(error, null, JSON.stringify(error));
  return data;
}

function refused({ data, error }, status, code) {
  assert.equal(data, null);
  assert.equal(error?.status, status, JSON.stringify(error));
  assert.equal(error.code, code, JSON.stringify(error));
  return error;
}

function near(date, expected, toleranceMs = 120_000) {
  assert.ok(date instanceof Date, `not a Date: ${JSON.stringify(date)}`);
  const off = Math.abs(date.getTime() - expected);
  assert.ok(off < toleranceMs, `${date.toISOString()} is off by ${off} ms`);
}

let advancedMs = 0;
const now = () => Date.now() + advancedMs;
async function advance(seconds) {
  await ask("advance", seconds);
  advancedMs += seconds * 1000;
}

const ada = newClient();
const { client: auth } = ada;
let user;

await check("no session at first", async () => {
  assert.equal(fine(await auth.getSession()), null);
  refused(await auth.listSessions(), 401, "UNAUTHORIZED");
});

await check("sign up", async () => {
  const data = fine(await auth.signUp.email({ name: "Ada", email: email.toUpperCase(), password }));
  user = data.user;
  assert.equal(user.email, email);
  assert.equal(user.name, "Ada");
  assert.equal(user.emailVerified, false);
  assert.match(user.id, /^[a-zA-Z0-9]{32}$/);
  assert.match(data.token, /^[a-zA-Z0-9]{32}$/);
  near(user.createdAt, now());
});

await check("the cookie is as on the real thing", async () => {
  assert.equal(ada.seen.setCookie.length, 1);
  assert.match(
    ada.seen.setCookie[0],
    /^better-auth\.session_token=[a-zA-Z0-9]{32}\.[a-zA-Z0-9%]+%3D; Max-Age=604800; Path=\/; HttpOnly; SameSite=Lax$/,
  );
});

await check("sign up again is refused", async () => {
  const error = refused(
    await newClient().client.signUp.email({ name: "Eve", email, password }), 422, "USER_ALREADY_EXISTS_USE_ANOTHER_EMAIL",
  );
  assert.equal(error.message, "User already exists. Use another email.");
});

await check("passwords have a shortest and a longest", async () => {
  const other = newClient().client;
  refused(await other.signUp.email({ name: "E", email: "e@example.com", password: "1234567" }), 400, "PASSWORD_TOO_SHORT");
  refused(await other.signUp.email({ name: "E", email: "e@example.com", password: "x".repeat(129) }), 400, "PASSWORD_TOO_LONG");
  refused(await other.signUp.email({ name: "E", email: "no address", password }), 400, "VALIDATION_ERROR");
});

await check("read the session", async () => {
  const data = fine(await auth.getSession());
  assert.equal(data.user.id, user.id);
  assert.equal(data.session.userId, user.id);
  assert.equal(data.session.userAgent, "test browser");
  near(data.session.expiresAt, now() + 7 * DAY_S * 1000);
  near(data.session.createdAt, now());
});

await check("useSession has it too", async () => {
  const value = await new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error("no session within 5 s")), 5000);
    auth.useSession.subscribe((state) => {
      if (state.isPending || !state.data) return;
      clearTimeout(timer);
      resolve(state);
    });
  });
  assert.equal(value.data.user.email, email);
});

await check("sign in with a wrong password, or as nobody", async () => {
  const other = newClient().client;
  refused(await other.signIn.email({ email, password: "wrong password" }), 401, "INVALID_EMAIL_OR_PASSWORD");
  refused(await other.signIn.email({ email: "nobody@example.com", password }), 401, "INVALID_EMAIL_OR_PASSWORD");
  refused(await other.signIn.email({ email: "nobody", password }), 400, "INVALID_EMAIL");
});

const phone = newClient(address, { userAgent: "phone" });
await check("sign in from another browser", async () => {
  const data = fine(await phone.client.signIn.email({ email, password }));
  assert.equal(data.user.id, user.id);
  assert.equal(data.redirect, false);
  assert.equal(fine(await phone.client.getSession()).session.userAgent, "phone");
});

await check("sign in without being remembered", async () => {
  const cafe = newClient(address, { userAgent: "cafe" });
  fine(await cafe.client.signIn.email({ email, password, rememberMe: false }));
  assert.equal(cafe.seen.setCookie.length, 2);
  assert.ok(cafe.seen.setCookie.every((line) => !line.includes("Max-Age")), cafe.seen.setCookie.join("\n"));
  near(fine(await cafe.client.getSession()).session.expiresAt, now() + DAY_S * 1000);
});

await check("sign in with a callback on this server, and on another", async () => {
  const other = newClient().client;
  const data = fine(await other.signIn.email({ email, password, callbackURL: "/studio" }));
  assert.deepEqual([data.redirect, data.url, window.location.href], [true, "/studio", "/studio"]);
  refused(await other.signIn.email({ email, password, callbackURL: "https://evil.example" }), 403, "INVALID_CALLBACK_URL");
});

await check("a page of another site cannot sign in, nor use a session", async () => {
  const evil = newClient("https://evil.example");
  refused(await evil.client.signIn.email({ email, password }), 403, "INVALID_ORIGIN");
  evil.jar.set("better-auth.session_token", ada.jar.get("better-auth.session_token"));
  refused(await evil.client.updateUser({ name: "Eve" }), 403, "INVALID_ORIGIN");
  refused(await evil.client.signOut(), 403, "INVALID_ORIGIN");
});

await check("a page of a trusted site can", async () => {
  const studio = newClient("https://studio.example");
  fine(await studio.client.signIn.email({ email, password }));
  fine(await studio.client.signOut());
});

await check("list sessions, revoke one", async () => {
  const before = fine(await auth.listSessions());
  assert.deepEqual(before.map((each) => each.userAgent), ["test browser", "phone", "cafe", "test browser"]);
  assert.ok(before.every((each) => each.createdAt instanceof Date && each.token.length === 32));
  const { token } = before.find((each) => each.userAgent === "phone");
  assert.equal(fine(await auth.revokeSession({ token })).status, true);
  assert.equal(fine(await phone.client.getSession()), null);
  assert.equal(phone.jar.size, 0);
  assert.equal(fine(await auth.listSessions()).length, 3);
  assert.equal(fine(await auth.revokeSession({ token: "of-nobody" })).status, true);
});

await check("revoke the others", async () => {
  fine(await auth.revokeOtherSessions());
  assert.equal(fine(await auth.listSessions()).length, 1);
});

await check("another user's session is left alone", async () => {
  const eve = newClient();
  fine(await eve.client.signUp.email({ name: "Eve", email: `eve.${email}`, password }));
  const { token } = fine(await auth.listSessions())[0];
  fine(await eve.client.revokeSession({ token }));
  assert.notEqual(fine(await auth.getSession()), null);
  assert.equal(fine(await eve.client.listSessions()).length, 1);
});

await check("change name and picture", async () => {
  fine(await auth.updateUser({ name: "Ada Lovelace", image: "https://example.com/ada.png" }));
  let found = fine(await auth.getSession()).user;
  assert.deepEqual([found.name, found.image], ["Ada Lovelace", "https://example.com/ada.png"]);
  fine(await auth.updateUser({ image: null }));
  found = fine(await auth.getSession()).user;
  assert.deepEqual([found.name, found.image], ["Ada Lovelace", null]);
});

await check("what cannot be changed", async () => {
  refused(await auth.updateUser({ email: "x@example.com" }), 400, "EMAIL_CAN_NOT_BE_UPDATED");
  refused(await auth.updateUser({ role: "admin" }), 400, "FIELD_NOT_ALLOWED");
  refused(await auth.changeEmail({ newEmail: "x@example.com" }), 400, "CHANGE_EMAIL_DISABLED");
  const { error } = await auth.updateUser({ plan: "pro", balance: 1000 });
  assert.deepEqual([error.status, error.message], [400, "No fields to update"]);
});

await check("change the password", async () => {
  const next = "tr\u00e8s secr\u00e8t \u{1F34C}";
  refused(await auth.changePassword({ currentPassword: "wrong password", newPassword: next }), 400, "INVALID_PASSWORD");
  refused(await auth.changePassword({ currentPassword: current, newPassword: "short" }), 400, "PASSWORD_TOO_SHORT");
  const data = fine(await auth.changePassword({ currentPassword: current, newPassword: next }));
  assert.deepEqual([data.token, data.user.id], [null, user.id]);
  current = next;
  refused(await newClient().client.signIn.email({ email, password }), 401, "INVALID_EMAIL_OR_PASSWORD");
  fine(await newClient().client.signIn.email({ email, password: current.normalize("NFD") }));
});

await check("change the password, and end every session", async () => {
  const other = newClient();
  fine(await other.client.signIn.email({ email, password: current }));
  const data = fine(await auth.changePassword({ currentPassword: current, newPassword: password, revokeOtherSessions: true }));
  current = password;
  assert.match(data.token, /^[a-zA-Z0-9]{32}$/);
  assert.equal(fine(await other.client.getSession()), null);
  assert.equal(fine(await auth.getSession()).session.token, data.token);
  assert.equal(fine(await auth.listSessions()).length, 1);
});

await check("accounts", async () => {
  const [account, ...more] = fine(await auth.listAccounts());
  assert.deepEqual(more, []);
  assert.equal(account.providerId ?? account.provider, "credential");
  near(account.createdAt, now());
});

await check("what is not offered says so", async () => {
  refused(await auth.signIn.social({ provider: "github" }), 404, "PROVIDER_NOT_FOUND");
  refused(await auth.sendVerificationEmail({ email }), 400, "VERIFICATION_EMAIL_NOT_ENABLED");
  const { error } = await auth.$fetch("/no/such/route", { method: "POST", body: {} });
  assert.equal(error.status, 404);
});

let key;
await check("make an API key", async () => {
  key = fine(await auth.apiKey.create({ name: "laptop", expiresIn: 30 * DAY_S, metadata: { for: "tests" } }));
  assert.match(key.key, /^bnp_[a-zA-Z]{64}$/);
  assert.equal(key.start, key.key.slice(0, 6));
  assert.deepEqual([key.name, key.prefix, key.enabled], ["laptop", "bnp_", true]);
  assert.equal(key.referenceId, user.id);
  assert.deepEqual(key.metadata, { for: "tests" });
  near(key.expiresAt, now() + 30 * DAY_S * 1000);
});

await check("the key opens the other routes", async () => {
  for (const headers of [{ authorization: `Bearer ${key.key}` }, { "x-api-key": key.key }]) {
    const answer = await fetch(`${address}/api/credits`, { headers });
    assert.equal(answer.status, 200);
    assert.equal((await answer.json()).balance, 10);
  }
});

await check("the key opens get-session, and nothing else of auth", async () => {
  const headers = { "x-api-key": key.key };
  const found = await (await fetch(`${address}/api/auth/get-session`, { headers })).json();
  assert.deepEqual([found.user.id, found.session.id, found.session.token], [user.id, key.id, key.key]);
  for (const path of ["list-sessions", "api-key/list", "list-accounts"]) {
    assert.equal((await fetch(`${address}/api/auth/${path}`, { headers })).status, 401);
  }
});

await check("list keys, and get one", async () => {
  const second = fine(await auth.apiKey.create({}));
  const { apiKeys, total } = fine(await auth.apiKey.list());
  assert.deepEqual([total, apiKeys.map((each) => each.name)], [2, ["laptop", null]]);
  assert.ok(apiKeys.every((each) => each.key === undefined));
  const page = fine(await auth.apiKey.list({ query: { limit: 1, offset: 1, sortBy: "createdAt", sortDirection: "desc" } }));
  assert.deepEqual([page.total, page.apiKeys[0].id], [2, key.id]);
  assert.equal(fine(await auth.apiKey.get({ query: { id: second.id } })).id, second.id);
  assert.equal(fine(await auth.apiKey.delete({ keyId: second.id })).success, true);
  assert.equal(fine(await auth.apiKey.list()).total, 1);
});

await check("change a key", async () => {
  const changed = fine(await auth.apiKey.update({ keyId: key.id, name: "desk", enabled: false }));
  assert.deepEqual([changed.name, changed.enabled], ["desk", false]);
  const answer = await fetch(`${address}/api/credits`, { headers: { "x-api-key": key.key } });
  assert.deepEqual([answer.status, (await answer.json()).code], [401, "KEY_DISABLED"]);
  fine(await auth.apiKey.update({ keyId: key.id, enabled: true, expiresIn: null }));
  assert.equal(fine(await auth.apiKey.get({ query: { id: key.id } })).expiresAt, null);
});

await check("what a key may not be", async () => {
  refused(await auth.apiKey.create({ name: "x".repeat(33) }), 400, "INVALID_NAME_LENGTH");
  refused(await auth.apiKey.create({ expiresIn: 60 }), 400, "EXPIRES_IN_IS_TOO_SMALL");
  refused(await auth.apiKey.create({ expiresIn: 366 * DAY_S }), 400, "EXPIRES_IN_IS_TOO_LARGE");
  refused(await auth.apiKey.create({ prefix: "x".repeat(33) }), 400, "INVALID_PREFIX_LENGTH");
  refused(await auth.apiKey.create({ permissions: { plantain: ["admin"] } }), 400, "SERVER_ONLY_PROPERTY");
  refused(await auth.apiKey.update({ keyId: key.id, rateLimitMax: 1e9 }), 400, "SERVER_ONLY_PROPERTY");
  refused(await auth.apiKey.update({ keyId: key.id }), 400, "NO_VALUES_TO_UPDATE");
});

await check("a key is its owner's only", async () => {
  const eve = newClient();
  refused(await eve.client.apiKey.create({ name: "x" }), 401, "UNAUTHORIZED_SESSION");
  fine(await eve.client.signIn.email({ email: `eve.${email}`, password }));
  refused(await eve.client.apiKey.get({ query: { id: key.id } }), 404, "KEY_NOT_FOUND");
  refused(await eve.client.apiKey.update({ keyId: key.id, enabled: false }), 404, "KEY_NOT_FOUND");
  refused(await eve.client.apiKey.delete({ keyId: key.id }), 404, "KEY_NOT_FOUND");
  assert.equal(fine(await eve.client.apiKey.list()).total, 0);
});

await check("a deleted key stops at once", async () => {
  fine(await auth.apiKey.delete({ keyId: key.id }));
  const answer = await fetch(`${address}/api/credits`, { headers: { "x-api-key": key.key } });
  assert.deepEqual([answer.status, (await answer.json()).code], [401, "INVALID_API_KEY"]);
});

await check("bearer tokens", async () => {
  const window = browser(address);
  let bearer;
  const other = createAuthClient({
    baseURL: address,
    fetchOptions: {
      customFetchImpl: (input, init) => fetch(input, { ...init, headers: { ...Object.fromEntries(new Headers(init.headers)), origin: address } }),
      auth: { type: "Bearer", token: () => bearer },
      onSuccess: ({ response }) => { bearer = response.headers.get("set-auth-token") ?? bearer; },
    },
  });
  const { token } = fine(await other.signIn.email({ email, password: current }));
  assert.match(bearer, new RegExp(`^${token}\\.[a-zA-Z0-9+/]{43}=$`));
  for (const form of [bearer, token, encodeURIComponent(bearer)]) {
    bearer = form;
    assert.equal(fine(await other.getSession()).session.token, token);
  }
  bearer = `${token}.${"A".repeat(43)}=`;
  assert.equal(fine(await other.getSession()), null);
  const answer = await fetch(`${address}/api/credits`, { headers: { authorization: `Bearer ${token}` } });
  assert.equal(answer.status, 200);
  bearer = token;
  fine(await other.signOut());
  assert.equal((await fetch(`${address}/api/credits`, { headers: { authorization: `Bearer ${token}` } })).status, 401);
  assert.equal(window.jar.size, 0);
});

await check("the cookie opens the other routes, unless another site's page sends it", async () => {
  const cookie = [...ada.jar].map(([name, value]) => `${name}=${value}`).join("; ");
  assert.equal((await fetch(`${address}/api/credits`, { headers: { cookie } })).status, 200);
  const post = (headers) => fetch(`${address}/api/uploads`, { method: "POST", headers: { cookie, ...headers }, body: "x" });
  const foreign = await post({ origin: "https://evil.example" });
  assert.deepEqual([foreign.status, (await foreign.json()).code], [403, "INVALID_ORIGIN"]);
  for (const headers of [{ origin: address }, { origin: "https://studio.example" }, {}]) {
    assert.notEqual((await post(headers)).status, 403);
  }
});

await check("the session is renewed after a day, not before", async () => {
  const before = fine(await auth.getSession()).session;
  await advance(DAY_S - 300);
  assert.deepEqual(fine(await auth.getSession()).session.expiresAt, before.expiresAt);
  assert.deepEqual(ada.seen.setCookie, []);
  await advance(600);
  refused(await auth.listSessions(), 403, "SESSION_NOT_FRESH");
  const after = fine(await auth.getSession()).session;
  assert.equal(after.token, before.token);
  near(after.expiresAt, now() + 7 * DAY_S * 1000);
});

await check("the renewed session comes with its cookie again", async () => {
  await advance(DAY_S + 60);
  fine(await auth.getSession({ query: { disableRefresh: true } }));
  assert.deepEqual(ada.seen.setCookie, []);
  fine(await auth.getSession());
  assert.match(ada.seen.setCookie[0], /; Max-Age=604800; /);
});

await check("a session dies in the end", async () => {
  await advance(7 * DAY_S + 60);
  assert.equal(fine(await auth.getSession()), null);
  assert.equal(ada.seen.setCookie.length, 3);
  assert.equal(ada.jar.size, 0);
  fine(await auth.signIn.email({ email, password: current }));
});

await check("reset the password by mail", async () => {
  const other = newClient();
  const names = isOld && other.client.forgetPassword ? ["forgetPassword", "requestPasswordReset"] : ["requestPasswordReset"];
  for (const name of names) {
    const same = fine(await other.client[name]({ email: "nobody@example.com", redirectTo: "/reset" }));
    assert.deepEqual(fine(await other.client[name]({ email, redirectTo: "/reset" })), same);
  }
  const mail = await ask("mail");
  assert.equal(mail.to, email);
  const link = mail.text.match(/http\S+/g).find((each) => each.includes("reset-password"));
  const followed = await fetch(link, { redirect: "manual" });
  assert.equal(followed.status, 302);
  const page = new URL(followed.headers.get("location"));
  assert.deepEqual([page.origin, page.pathname], [address, "/reset"]);
  const token = page.searchParams.get("token");
  refused(await other.client.resetPassword({ newPassword: "short", token }), 400, "PASSWORD_TOO_SHORT");
  assert.equal(fine(await other.client.resetPassword({ newPassword: "another password", token })).status, true);
  refused(await other.client.resetPassword({ newPassword: "a third password", token }), 400, "INVALID_TOKEN");
  current = "another password";
  assert.equal(fine(await auth.getSession()), null);
  fine(await auth.signIn.email({ email, password: current }));
  const again = await fetch(link, { redirect: "manual" });
  assert.equal(new URL(again.headers.get("location")).searchParams.get("error"), "INVALID_TOKEN");
});

await check("a reset link leads to no other site", async () => {
  refused(await auth.requestPasswordReset({ email, redirectTo: "https://evil.example" }), 403, "INVALID_REDIRECT_URL");
  const answer = await fetch(`${address}/api/auth/reset-password/x?callbackURL=https://evil.example`, { redirect: "manual" });
  assert.equal(answer.status, 403);
});

await check("a reset link lives an hour", async () => {
  fine(await auth.requestPasswordReset({ email, redirectTo: "/reset" }));
  const mail = await ask("mail");
  const token = mail.text.match(/reset-password\/([a-zA-Z0-9]+)/)[1];
  await advance(3601);
  refused(await auth.resetPassword({ newPassword: "another password", token }), 400, "INVALID_TOKEN");
});

await check("sign out", async () => {
  const { jar } = ada;
  const cookie = [...jar].map(([name, value]) => `${name}=${value}`).join("; ");
  assert.equal(fine(await auth.signOut()).success, true);
  assert.equal(jar.size, 0);
  assert.equal(ada.seen.setCookie.length, 3);
  assert.ok(ada.seen.setCookie.every((line) => line.endsWith("=; Max-Age=0; Path=/; HttpOnly; SameSite=Lax")));
  assert.equal(await (await fetch(`${address}/api/auth/get-session`, { headers: { cookie } })).json(), null);
  assert.equal(fine(await auth.signOut()).success, true);
});

await check("delete the account", async () => {
  fine(await auth.signIn.email({ email, password: current }));
  const { key } = fine(await auth.apiKey.create({ name: "left behind" }));
  refused(await auth.deleteUser({ password: "wrong password" }), 400, "INVALID_PASSWORD");
  const data = fine(await auth.deleteUser({ password: current }));
  assert.deepEqual([data.success, data.message], [true, "User deleted"]);
  assert.equal(ada.jar.size, 0);
  refused(await auth.signIn.email({ email, password: current }), 401, "INVALID_EMAIL_OR_PASSWORD");
  assert.equal((await fetch(`${address}/api/credits`, { headers: { "x-api-key": key } })).status, 401);
  fine(await auth.signUp.email({ name: "Ada", email, password }));
});

await check("without the password, an old session cannot delete the account", async () => {
  await advance(DAY_S + 60);
  refused(await auth.deleteUser(), 400, "SESSION_EXPIRED");
  fine(await auth.signIn.email({ email, password }));
  assert.equal(fine(await auth.deleteUser()).success, true);
});

done();
