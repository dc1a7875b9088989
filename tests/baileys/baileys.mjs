// The door to the two real Baileys, and the stores the test programs keep auth state in.
import { createRequire } from 'node:module'

// libsignal narrates on the console, and these programs print one JSON document.
for (const level of ['log', 'info', 'warn', 'error']) console[level] = () => {}

const quiet = () => {}
export const logger = { level: 'silent', trace: quiet, debug: quiet, info: quiet, warn: quiet, error: quiet }
logger.child = () => logger

/** Baileys 6 or 7 as its users import it, and the parts of it that it does not export by name. */
export async function loadBaileys(version) {
	const home = new URL(`./v${version}/`, import.meta.url)
	const entry = createRequire(home).resolve('baileys')
	const part = name => import(new URL(name, `file://${entry}`))
	return {
		...(await import(entry)),
		...(await part('./Signal/libsignal.js')),
		...(version === 7 ? await part('./Utils/tc-token-utils.js') : {}),
		version
	}
}

/**
 * What PostgreSQL holds for one company: creds, and every key as its service would have stored it.
 * Each value is kept as two JSON texts: `stored`, in the company's stored form, and `canonical`, as Baileys' own
 * useMultiFileAuthState writes it. So no expectation of the tests rests on a normaliser of ours.
 */
export class Ledger {
	constructor(baileys, form, { creds = null, keys = [] } = {}) {
		this.baileys = baileys
		this.form = form
		this.creds = creds
		this.keys = new Map(keys.map(row => [`${row.key_type}\n${row.key_id}`, row]))
	}

	texts(value, name) {
		const canonical = JSON.stringify(value, this.baileys.BufferJSON.replacer)
		return { stored: isBase64(this.form, name) ? canonical : JSON.stringify(value), canonical }
	}

	revive(text) {
		return JSON.parse(text, this.baileys.BufferJSON.reviver)
	}

	saveCreds(creds) {
		this.creds = this.texts(creds, 'creds')
	}

	/** @param data the argument of SignalKeyStore.set: {type: {id: value, or null to delete}} */
	record(data) {
		for (const [key_type, values] of Object.entries(data)) {
			for (const [key_id, value] of Object.entries(values)) {
				const name = `${key_type}\n${key_id}`
				if (value) this.keys.set(name, { key_type, key_id, ...this.texts(value, name) })
				else this.keys.delete(name)
			}
		}
	}

	read(type, id) {
		const row = this.keys.get(`${type}\n${id}`)
		if (!row) return null
		const value = this.revive(row.canonical)
		return type === 'app-state-sync-key' ? this.baileys.proto.Message.AppStateSyncKeyData.fromObject(value) : value
	}

	/** A SignalKeyStore over the ledger alone. */
	store() {
		return {
			get: (type, ids) => Object.fromEntries(ids.map(id => [id, this.read(type, id)])),
			set: data => this.record(data)
		}
	}

	toJSON() {
		return { creds: this.creds, keys: [...this.keys.values()] }
	}
}

/** 'mixed' is a database whose service changed its serializer one day: some rows of each. */
function isBase64(form, name) {
	if (form !== 'mixed') return form === 'base64'
	return Buffer.from(name).reduce((sum, byte) => sum + byte) % 2 === 0
}

/**
 * One device of WhatsApp: creds and keys as Baileys holds them, behind Baileys' own Signal repository.
 * @param uploaded {pre-key id: public key in base64}: every pre-key that WhatsApp was ever given by the device
 */
export function makeDevice(baileys, creds, store, uploaded = {}) {
	const keys = baileys.addTransactionCapability(store, logger, { maxCommitRetries: 1, delayBetweenTriesMs: 1 })
	const repository = baileys.makeLibSignalRepository({ creds, keys }, logger)
	return { baileys, creds, keys, repository, uploaded, usedAgain: [] }
}

/**
 * Generate pre-keys as Baileys does at login and for a retry, and give them to WhatsApp; returns {id: key pair}.
 * WhatsApp keeps the first key it has of an id: one that comes again with another key will break first messages.
 */
export async function uploadPreKeys(device, count) {
	const { update, preKeys } = await device.baileys.getNextPreKeys(device, count)
	Object.assign(device.creds, update)
	for (const [id, pair] of Object.entries(preKeys)) {
		const publicKey = Buffer.from(pair.public).toString('base64')
		device.uploaded[id] ??= publicKey
		if (device.uploaded[id] !== publicKey) device.usedAgain.push(id)
	}
	return preKeys
}

/** What WhatsApp's server gives to whoever starts a conversation with a device. */
export function preKeyBundle({ generateSignalPubKey }, creds, preKeyId, preKeyPublic) {
	return {
		registrationId: creds.registrationId,
		identityKey: generateSignalPubKey(creds.signedIdentityKey.public),
		signedPreKey: {
			keyId: creds.signedPreKey.keyId,
			publicKey: generateSignalPubKey(creds.signedPreKey.keyPair.public),
			signature: creds.signedPreKey.signature
		},
		preKey: { keyId: Number(preKeyId), publicKey: generateSignalPubKey(preKeyPublic) }
	}
}

/** A bundle with a pre-key the device has just uploaded. */
export async function freshBundle(device) {
	const [[id, pair]] = Object.entries(await uploadPreKeys(device, 1))
	return preKeyBundle(device.baileys, device.creds, id, pair.public)
}

/** A contact of the account: in memory only, and in the state file between two programs. */
export function makePeer(baileys, jid, saved) {
	const ledger = new Ledger(baileys, 'base64', saved)
	const creds = saved ? ledger.revive(saved.creds.canonical) : baileys.initAuthCreds()
	return { ...makeDevice(baileys, creds, ledger.store()), jid, ledger }
}
