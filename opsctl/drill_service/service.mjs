// The service of a full drill: real Baileys ratchets for each company of COMPANIES, kept in PostgreSQL, or in session
// folders where the flags say so. It answers each message, so both chains of each ratchet move with every turn.
// Like the real one it reads .env beside it, and what is in its environment already counts more.
import { existsSync, readFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { baileys, fromText, jsonLines, makeDevice, queue, toText } from './signal.mjs'

for (const line of existsSync('.env') ? readFileSync('.env', 'utf8').split('\n') : []) {
	const [, name, value] = /^([A-Z_0-9]+)=(.*)$/.exec(line) ?? []
	if (name) process.env[name] ??= value
}
const say = console.log.bind(console)
for (const level of ['log', 'info', 'warn', 'error']) console[level] = () => {} // libsignal narrates

const FLAGS = ['USE_REPOSITORY_PATTERN', 'USE_DATABASE_AUTH_STATE', 'USE_LEGACY_SUPABASE']
const onFolders = FLAGS.every(name => process.env[name] === 'false')
if (!onFolders && process.env.ONLY_FOLDERS) throw new Error('this code reads folders only, and the flags are not set')
if (process.env.OPSCTL_DRY_BOOT) process.exit(0)

/** whatsapp_auth and whatsapp_keys, as the reference service uses them. */
async function openDatabase(company) {
	const { default: pg } = await import('pg')
	pg.types.setTypeParser(pg.types.builtins.JSONB, text => text)
	const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 1 })
	pool.on('error', () => {})
	const { rows } = await pool.query('SELECT creds FROM whatsapp_auth WHERE company_id = $1', [company])
	if (rows.length === 0) throw new Error(`company ${company} has no credentials`)
	const store = {
		broken: false,
		get: async (type, ids) => {
			const sql = 'SELECT key_id, value FROM whatsapp_keys WHERE company_id = $1 AND key_type = $2 AND key_id = ANY($3)'
			const found = await pool.query(sql, [company, type, ids])
			return Object.fromEntries(found.rows.map(row => [row.key_id, fromText(row.value)]))
		},
		set: async data => {
			for (const [type, values] of Object.entries(data)) {
				for (const [id, value] of Object.entries(values)) {
					if (!value) await pool.query('DELETE FROM whatsapp_keys WHERE company_id = $1 AND key_type = $2 AND key_id = $3', [company, type, id])
					else await pool.query(UPSERT, [company, type, id, toText(value)])
				}
			}
		}
	}
	const sql = 'UPDATE whatsapp_auth SET creds = $2, updated_at = now() WHERE company_id = $1'
	for (const act of ['get', 'set']) {
		const real = store[act]
		store[act] = (...what) => real(...what).catch(error => {
			store.broken = true
			throw error
		})
	}
	return { creds: fromText(rows[0].creds), store, saveCreds: creds => pool.query(sql, [company, toText(creds)]) }
}

const UPSERT = `INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, updated_at, expires_at)
	VALUES ($1, $2, $3, $4, now(), now() + interval '7 days')
	ON CONFLICT (company_id, key_type, key_id)
	DO UPDATE SET value = EXCLUDED.value, updated_at = EXCLUDED.updated_at, expires_at = EXCLUDED.expires_at`

/** Baileys' own folders. A company that has none would become a new identity: here it is an error. */
async function openFolder(company) {
	const folder = join('baileys_sessions', company.startsWith('company_') ? company : `company_${company}`)
	if (!existsSync(join(folder, 'creds.json'))) throw new Error(`company ${company} has no folder`)
	const { state, saveCreds } = await baileys.useMultiFileAuthState(folder)
	return { creds: state.creds, store: state.keys, saveCreds }
}

async function run(company) {
	const { creds, store, saveCreds } = await (onFolders ? openFolder(company) : openDatabase(company))
	const device = makeDevice(creds, store)
	const one = queue()
	const socket = connect(Number(process.env.WORLD_PORT), '127.0.0.1')
	let contact = null
	let written = 0
	const tell = jsonLines(socket, message => {
		if (message.op === 'open') {
			contact = message.contact
			written = message.written
			say(`${new Date().toISOString()} company ${company} connection open`)
		} else if (message.op === 'message') one(() => answer(message))
	})
	socket.on('error', error => say(`company ${company} connection errored ${error.code}`))
	if (company !== process.env.NEVER_CONNECTS) tell({ op: 'login', company })

	async function answer({ number, type, ciphertext }) {
		if (stopping || store.broken) return // WhatsApp keeps it
		try {
			await device.repository.decryptMessage({ jid: contact, type, ciphertext: Buffer.from(ciphertext, 'base64') })
		} catch (error) {
			if (store.broken) return say(`company ${company} cannot reach its store`)
			say(`company ${company} failed to decrypt: ${error.message}`)
			tell({ op: 'confirm', number, failed: true })
			return
		}
		tell({ op: 'confirm', number })
		const data = Buffer.from(`${(written += 1)}`)
		const out = await device.repository.encryptMessage({ jid: contact, data })
		tell({ op: 'write', type: out.type, ciphertext: Buffer.from(out.ciphertext).toString('base64') })
		if (number % 10 === 0) {
			creds.accountSyncCounter = (creds.accountSyncCounter ?? 0) + 1
			await Promise.resolve(saveCreds(creds)).catch(() => (store.broken = true))
		}
	}
	return async () => {
		await one(() => {})
		await new Promise(done => socket.end(done))
	}
}

let stopping = false
const running = await Promise.all(process.env.COMPANIES.split(',').map(run))
say(`${process.pid} runs ${running.length} companies ${onFolders ? 'on folders' : 'on PostgreSQL'} in ${process.cwd()}`)
for (const signal of ['SIGINT', 'SIGTERM']) {
	process.on(signal, async () => {
		if (stopping) return
		stopping = true
		await Promise.all(running.map(stop => stop()))
		process.exit(0)
	})
}
