// What Baileys itself would have written: an oracle for "equal to the byte" that shares no code with opsctl.
// Reads NDJSON rows {company_id, key_type (null for creds), key_id, value: JSON text as PostgreSQL prints it} on stdin,
// prints NDJSON {company_id, file, sha256}.
import { createHash } from 'node:crypto'
import { createInterface } from 'node:readline'
import { loadBaileys } from './baileys.mjs'
import { fileOf } from './fleet.mjs'

const { BufferJSON } = await loadBaileys(7)

const isByte = value => Number.isInteger(value) && value >= 0 && value <= 255

/** Baileys' reviver, and the byte forms that plain JSON.stringify leaves behind, of which each version reads one. */
function revive(name, value) {
	const revived = BufferJSON.reviver(name, value)
	if (revived === null || typeof revived !== 'object' || Array.isArray(revived) || Buffer.isBuffer(revived)) return revived
	if (revived.type === 'Buffer' && Array.isArray(revived.data)) return Buffer.from(revived.data)
	const entries = Object.entries(revived)
	if (entries.length && entries.every(([key, byte]) => /^\d+$/.test(key) && isByte(byte))) return Buffer.from(Object.values(revived))
	return revived
}

for await (const line of createInterface({ input: process.stdin })) {
	const { company_id, key_type, key_id, value } = JSON.parse(line)
	const bytes = JSON.stringify(JSON.parse(value, revive), BufferJSON.replacer)
	const file = key_type === null ? 'creds.json' : fileOf(key_type, key_id)
	const sha256 = createHash('sha256').update(bytes).digest('hex')
	process.stdout.write(`${JSON.stringify({ company_id, file, sha256 })}\n`)
}
