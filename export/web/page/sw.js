// Keeps the site for offline use. The build writes VERSION and FILES above. A new version waits
// until no page of the old one is open: their files may not be mixed.
// The library is kept when it is first used: of its two variants a device needs one.

// Another site of this origin has caches of its own.
const PREFIX = `unnoise-${self.registration.scope}-`;
const CACHE = PREFIX + VERSION;
// The browser's own cache may still hold files of the old version.
const REVALIDATED = { cache: "no-cache" };

self.addEventListener("install", (event) => {
  const requests = FILES.map((name) => new Request(name, REVALIDATED));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(requests)));
});

self.addEventListener("activate", (event) => {
  event.waitUntil(removeOthers().then(() => self.clients.claim()));
});

async function removeOthers() {
  const names = await caches.keys();
  const old = names.filter((name) => name.startsWith(PREFIX) && name !== CACHE);
  await Promise.all(old.map((name) => caches.delete(name)));
}

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const isOwn = new URL(request.url).origin === self.location.origin;
  if (request.method === "GET" && isOwn) event.respondWith(answer(request));
});

async function answer(request) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(request, { ignoreSearch: true });
  if (kept) return kept;
  const response = await fetch(request, REVALIDATED);
  if (response.status === 200) await cache.put(request, response.clone());
  return response;
}
