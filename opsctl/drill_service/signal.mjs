// The door to the real Baileys: one device with its own Signal repository, over any store of keys.
import { createRequire } from 'node:module'

const quiet = () => {}
const logger = { level: 'silent', trace: quiet, debug: quiet, info: quiet, warn: quiet, error: quiet }
logger.child = () => logger

const entry = createRequire(import.meta.url).resolve('baileys')
export const baileys = {
	...(await import(entry)),
	...(await import(new URL('./Signal/libsignal.js', `file://${entry}`)))
}

/** creds and keys as Baileys holds them, behind Baileys' own Signal repository. */
export function makeDevice(creds, store) {
	const keys = baileys.addTransactionCapability(store, logger, { maxCommitRetries: 3, delayBetweenTriesMs: 50 })
	return { creds, keys, repository: baileys.makeLibSignalRepository({ creds, keys }, logger) }
}

/** Plain JSON.stringify, as the reference service stores it: bytes become {"type":"Buffer","data":[1,2,3]}. */
export const toText = value =>
	JSON.stringify(value, (_, found) => (found instanceof Uint8Array ? Buffer.from(found).toJSON() : found))

export const fromText = text =>
	JSON.parse(text, (_, found) => {
		if (found?.type !== 'Buffer') return found
		return Array.isArray(found.data) ? Buffer.from(found.data) : Buffer.from(found.data, 'base64')
	})

/** JSON lines over a socket, each handed to `take` in its order. */
export function jsonLines(socket, take) {
	let rest = ''
	socket.setEncoding('utf8')
	socket.on('data', text => {
		const lines = (rest + text).split('\n')
		rest = lines.pop()
		for (const line of lines) take(JSON.parse(line))
	})
	return message => socket.write(`${JSON.stringify(message)}\n`)
}

/** Runs what it is given one after the other. */
export function queue() {
	let last = Promise.resolve()
	return work => (last = last.then(work))
}
