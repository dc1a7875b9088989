// The rival: restores as the old restore-file-sessions.js did, with its two fatal faults mended (names that carry the
// key type, from the column that exists), so that it does the same work. One company after the other, one awaited
// writeFile per key, values as they come from the driver; no normalising, no staging, no fsync, no digest.
//   DATABASE_URL=... node rival_restore.mjs DIR
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import pg from 'pg'

const [root] = process.argv.slice(2)
if (!root || !process.env.DATABASE_URL) {
	process.stderr.write('usage: DATABASE_URL=... node rival_restore.mjs DIR\n')
	process.exit(2)
}

const fixFileName = file => file.replace(/\//g, '__').replace(/:/g, '-')

const started = performance.now()
const client = new pg.Client({ connectionString: process.env.DATABASE_URL })
await client.connect()
const { rows: companies } = await client.query('SELECT company_id, creds FROM whatsapp_auth ORDER BY company_id')
let files = 0
for (const { company_id, creds } of companies) {
	const folder = join(root, company_id.startsWith('company_') ? company_id : `company_${company_id}`)
	await mkdir(folder, { recursive: true })
	await writeFile(join(folder, 'creds.json'), JSON.stringify(creds))
	const { rows } = await client.query('SELECT key_type, key_id, value FROM whatsapp_keys WHERE company_id = $1', [company_id])
	for (const { key_type, key_id, value } of rows) {
		await writeFile(join(folder, fixFileName(`${key_type}-${key_id}.json`)), JSON.stringify(value))
	}
	files += 1 + rows.length
}
await client.end()
const elapsed_s = (performance.now() - started) / 1000
process.stdout.write(`${JSON.stringify({ companies: companies.length, files, elapsed_s })}\n`)
