// The other side of a full drill: WhatsApp, as far as the service can tell, and a contact for each company.
//   node world.mjs --companies N --every MS    prints {"port", "rows"}, then serves until its stdin closes
// It keeps what it has for a company until that has confirmed it, numbers every message in both directions, and counts
// what a user would notice: `lost` messages that cannot be decrypted or never come, `rekeyed` conversations that were
// begun anew. It knows every company's secrets: it made them.
import { createServer } from 'node:net'
import { parseArgs } from 'node:util'
import { baileys, fromText, jsonLines, makeDevice, queue, toText } from './signal.mjs'

for (const level of ['log', 'info', 'warn', 'error']) console[level] = () => {} // libsignal narrates

const { values: options } = parseArgs({
	options: { companies: { type: 'string', default: '2' }, every: { type: 'string', default: '100' } }
})

class Memory {
	rows = new Map()
	get = async (type, ids) =>
		Object.fromEntries(ids.map(id => [id, this.rows.has(`${type}\n${id}`) ? fromText(this.rows.get(`${type}\n${id}`)) : null]))
	set = async data => {
		for (const [type, values] of Object.entries(data)) {
			for (const [id, value] of Object.entries(values)) {
				if (value) this.rows.set(`${type}\n${id}`, toText(value))
				else this.rows.delete(`${type}\n${id}`)
			}
		}
	}
}

/** Pair with a phone of our own making, through Baileys' own code. */
function pair(creds, jid, lid) {
	const { Curve, configureSuccessfulPairing, hmacSign, proto } = baileys
	const phone = Curve.generateKeyPair()
	const deviceDetails = proto.ADVDeviceIdentity.encode({ rawId: 1, timestamp: 1760000000, keyIndex: 1 }).finish()
	const signed = Buffer.concat([Buffer.from([6, 0]), deviceDetails, creds.signedIdentityKey.public])
	const accountSignature = Curve.sign(phone.private, signed)
	const details = proto.ADVSignedDeviceIdentity.encode({
		details: deviceDetails,
		accountSignatureKey: phone.public,
		accountSignature
	}).finish()
	const hmac = hmacSign(details, Buffer.from(creds.advSecretKey, 'base64'))
	const content = [
		{ tag: 'device-identity', attrs: {}, content: proto.ADVSignedDeviceIdentityHMAC.encode({ details, hmac }).finish() },
		{ tag: 'device', attrs: { jid, lid } },
		{ tag: 'platform', attrs: { name: 'android' } },
		{ tag: 'biz', attrs: { name: 'a drill' } }
	]
	const stanza = { tag: 'iq', attrs: { id: '1' }, content: [{ tag: 'pair-success', attrs: {}, content }] }
	Object.assign(creds, configureSuccessfulPairing(stanza, creds).creds)
}

async function bundleOf({ creds, keys }) {
	const { update, preKeys } = await baileys.getNextPreKeys({ creds, keys }, 1)
	Object.assign(creds, update)
	const [[id, pair]] = Object.entries(preKeys)
	return {
		registrationId: creds.registrationId,
		identityKey: baileys.generateSignalPubKey(creds.signedIdentityKey.public),
		signedPreKey: {
			keyId: creds.signedPreKey.keyId,
			publicKey: baileys.generateSignalPubKey(creds.signedPreKey.keyPair.public),
			signature: creds.signedPreKey.signature
		},
		preKey: { keyId: Number(id), publicKey: baileys.generateSignalPubKey(pair.public) }
	}
}

/** One company's account as it was paired, with a contact whose conversation is under way. */
class Company {
	constructor(index) {
		this.id = String(962302 + index)
		const number = String(index).padStart(4, '0')
		this.jid = `49151000${number}:5@s.whatsapp.net`
		this.contactJid = `49170${number}001@s.whatsapp.net`
		this.contact = makeDevice(baileys.initAuthCreds(), new Memory())
		this.waiting = [] // what the account has not confirmed yet
		this.sent = this.confirmed = this.received = this.lost = this.rekeyed = 0
		this.one = queue()
	}

	/** The rows that the service's database has: creds, and a session that both sides have used. */
	async make() {
		const memory = new Memory()
		const creds = baileys.initAuthCreds()
		const account = makeDevice(creds, memory)
		pair(creds, this.jid, `18070000${this.id}:5@lid`)
		const { update } = await baileys.getNextPreKeys(account, 40)
		Object.assign(creds, update)
		await account.repository.injectE2ESession({ jid: this.contactJid, session: await bundleOf(this.contact) })
		for (let turn = 0; turn < 3; turn += 1) {
			const data = Buffer.from(`hello ${turn}`)
			const ours = await account.repository.encryptMessage({ jid: this.contactJid, data })
			await this.contact.repository.decryptMessage({ jid: this.jid, ...ours })
			const theirs = await this.contact.repository.encryptMessage({ jid: this.jid, data })
			await account.repository.decryptMessage({ jid: this.contactJid, ...theirs })
		}
		const keys = [...memory.rows].map(([name, value]) => [...name.split('\n'), value])
		return { company_id: this.id, creds: toText(creds), keys }
	}

	/** The contact writes. The message waits here until the account has confirmed it, as it would at WhatsApp. */
	async write() {
		const number = (this.sent += 1)
		const data = Buffer.from(`${number}`)
		const { type, ciphertext } = await this.contact.repository.encryptMessage({ jid: this.jid, data })
		if (type === 'pkmsg') this.rekeyed += 1
		this.waiting.push({ op: 'message', number, type, ciphertext: Buffer.from(ciphertext).toString('base64') })
		this.tell?.(this.waiting.at(-1))
	}

	login(tell) {
		this.tell = tell
		tell({ op: 'open', contact: this.contactJid, written: this.received })
		for (const message of this.waiting) tell(message)
	}

	confirm({ number, failed }) {
		if (!this.waiting.some(message => message.number === number)) return
		this.waiting = this.waiting.filter(message => message.number !== number)
		if (failed) this.lost += 1
		else this.confirmed += 1
	}

	/** The account writes; messages are numbered without gaps, so one that never comes is seen. */
	async read({ type, ciphertext }) {
		if (type === 'pkmsg') this.rekeyed += 1
		try {
			const words = { jid: this.jid, type, ciphertext: Buffer.from(ciphertext, 'base64') }
			const number = Number(Buffer.from(await this.contact.repository.decryptMessage(words)).toString())
			this.lost += Math.max(0, number - this.received - 1)
			this.received = Math.max(this.received, number)
		} catch {
			this.lost += 1
		}
	}

	counts() {
		const { id, sent, confirmed, received, lost, rekeyed } = this
		return { company: id, sent, confirmed, waiting: this.waiting.length, received, lost, rekeyed, connected: !!this.tell }
	}
}

const companies = new Map()
const rows = []
for (let index = 0; index < Number(options.companies); index += 1) {
	const company = new Company(index)
	companies.set(company.id, company)
	rows.push(await company.make())
}

let writing = true
setInterval(() => {
	if (writing) for (const company of companies.values()) company.one(() => company.write())
}, Number(options.every)).unref()

const server = createServer(socket => {
	let company = null
	socket.on('error', () => {})
	socket.on('close', () => company?.one(() => company.tell === tell && delete company.tell))
	const tell = jsonLines(socket, async message => {
		if (message.op === 'counts') tell([...companies.values()].map(one => one.counts()))
		else if (message.op === 'silence') tell({ writing: (writing = false) })
		else if (message.op === 'speak') tell({ writing: (writing = true) })
		else if (message.op === 'login') {
			company = companies.get(message.company)
			company.one(() => company.login(tell))
		} else if (message.op === 'confirm') company.one(() => company.confirm(message))
		else if (message.op === 'write') company.one(() => company.read(message))
	})
})
server.listen(0, '127.0.0.1', () => process.stdout.write(`${JSON.stringify({ port: server.address().port, rows })}\n`))
process.stdin.on('end', () => process.exit(0)).resume()
