// What a browser does for the client: it keeps cookies, and says which page is calling.

export function browser(origin, { userAgent = "test browser" } = {}) {
  const jar = new Map();
  const seen = { requests: 0, last: null, setCookie: [] };
  async function fetchAsBrowser(input, init = {}) {
    const headers = new Headers(input instanceof Request ? input.headers : undefined);
    new Headers(init.headers).forEach((value, name) => headers.set(name, value));
    headers.set("origin", origin);
    headers.set("user-agent", userAgent);
    if (jar.size) headers.set("cookie", [...jar].map(([name, value]) => `${name}=${value}`).join("; "));
    const answer = await fetch(input, { ...init, headers, redirect: "manual" });
    seen.requests += 1;
    seen.last = answer.clone();
    seen.setCookie = answer.headers.getSetCookie();
    for (const line of seen.setCookie) {
      const [pair, ...attributes] = line.split("; ");
      const name = pair.slice(0, pair.indexOf("="));
      if (attributes.includes("Max-Age=0")) jar.delete(name);
      else jar.set(name, pair.slice(pair.indexOf("=") + 1));
    }
    return answer;
  }
  return { jar, seen, fetch: fetchAsBrowser };
}
