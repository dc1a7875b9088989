// The service's side of the credentials cache (`.baileys-cache.json`), without the service.
//   node cache.mjs write FILE < creds-by-company.json      add these companies, as the service adds one that connects
//   node cache.mjs read FILE TTL_MS                        print the creds by company that it would start with
import { existsSync, readFileSync, renameSync, writeFileSync, chmodSync } from 'node:fs';
import { text } from 'node:stream/consumers';

/** Byte objects with an array or base64 become Buffers. */
function revived(value) {
  if (value === null || typeof value !== 'object') return value;
  if (value.type === 'Buffer' && Array.isArray(value.data)) return Buffer.from(value.data);
  if (value.type === 'Buffer' && typeof value.data === 'string') return Buffer.from(value.data, 'base64');
  if (Array.isArray(value)) return value.map(revived);
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, revived(item)]));
}

function load(file, ttlMs) {
  const entries = new Map();
  if (!existsSync(file)) return entries;
  for (const [company, entry] of Object.entries(JSON.parse(readFileSync(file, 'utf8')))) {
    if (Date.now() - entry.timestamp <= ttlMs) entries.set(company, { ...entry, creds: revived(entry.creds) });
  }
  return entries;
}

function save(file, entries) {
  writeFileSync(`${file}.tmp`, JSON.stringify(Object.fromEntries(entries), null, 2), 'utf8');
  chmodSync(`${file}.tmp`, 0o600);
  renameSync(`${file}.tmp`, file);
}

const [verb, file, ttlMs] = process.argv.slice(2);
if (verb === 'write') {
  const entries = load(file, Infinity);
  for (const [company, creds] of Object.entries(revived(JSON.parse(await text(process.stdin))))) {
    const timestamp = Date.now();
    entries.set(company, { creds: JSON.parse(JSON.stringify(creds)), keys: { _isCached: true, _timestamp: timestamp }, timestamp });
  }
  save(file, entries);
} else {
  const creds = Object.fromEntries([...load(file, Number(ttlMs))].map(([company, entry]) => [company, entry.creds]));
  // A replacer sees what toJSON made of a Buffer; the Buffer itself is still in `this`.
  const base64 = function (name, value) {
    return Buffer.isBuffer(this[name]) ? { type: 'Buffer', data: this[name].toString('base64') } : value;
  };
  process.stdout.write(JSON.stringify(creds, base64));
}
