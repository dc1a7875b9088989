// What a service's log holds when WhatsApp refuses it, or when messages cannot be decrypted: the lines that the real
// Baileys and its libsignal write, and one of the service's own per closed connection, with the status Baileys gives.
// usage: --version=6|7 --trouble=401|403|440|undecryptable|open --company=ID
import { createRequire } from 'node:module'
import { parseArgs } from 'node:util'

const narrate = { ...console }
const { introduce, encrypt } = await import('./conversations.mjs')
const { loadBaileys, makePeer } = await import('./baileys.mjs')
Object.assign(console, narrate)

const { values } = parseArgs({
	options: { version: { type: 'string' }, trouble: { type: 'string' }, company: { type: 'string' } }
})
const version = Number(values.version)
const baileys = await loadBaileys(version)
const home = new URL(`./v${version}/`, import.meta.url)
const pino = createRequire(createRequire(home).resolve('baileys'))('pino')
const logger = pino({ level: 'info' }, pino.destination({ dest: 1, sync: true }))
const service = logger.child({ companyId: values.company })

const node = (tag, attrs, content) => ({ tag, attrs, content })
const REFUSALS = {
	401: ['CB:stream:error', node('stream:error', { code: '401' }, [node('conflict', { type: 'device_removed' })])],
	403: ['CB:failure', node('failure', { reason: '403', location: 'odn' })],
	440: ['CB:stream:error', node('stream:error', {}, [node('conflict', { type: 'replaced' })])]
}

function refused([event, told]) {
	const socket = baileys.makeWASocket({
		auth: { creds: baileys.initAuthCreds(), keys: { get: () => ({}), set: () => {} } },
		logger,
		waWebSocketUrl: 'ws://127.0.0.1:9',
		version: [2, 3000, 1]
	})
	socket.ev.on('connection.update', ({ connection, lastDisconnect }) => {
		if (connection !== 'close') return
		service.warn({ statusCode: lastDisconnect?.error?.output?.statusCode }, 'connection closed')
		process.exit(0)
	})
	socket.ws.emit(event, told)
}

async function undecryptable() {
	const [alice, bob] = ['49151000001@s.whatsapp.net', '49151000002@s.whatsapp.net'].map(jid => makePeer(baileys, jid))
	for (let time = 0; time < 3; time++) {
		await introduce(alice, bob, bob.jid)
		const { type, ciphertext } = await encrypt(alice, bob.jid, Buffer.from('hello'))
		await bob.repository.decryptMessage({ jid: alice.jid, type, ciphertext })
		const later = await encrypt(bob, alice.jid, Buffer.from('hello'))
		const torn = Buffer.from(later.ciphertext)
		torn[torn.length - 1] ^= 1 // of its MAC
		for (const [jid, data] of [[bob.jid, torn], ['49151000003@s.whatsapp.net', later.ciphertext]]) {
			try {
				await alice.repository.decryptMessage({ jid, type: 'msg', ciphertext: data })
			} catch (err) {
				service.error({ key: { remoteJid: jid }, err }, 'failed to decrypt message')
			}
		}
	}
}

if (values.trouble === 'undecryptable') await undecryptable()
else if (values.trouble === 'open') service.info('opened connection to WA')
else refused(REFUSALS[values.trouble])
