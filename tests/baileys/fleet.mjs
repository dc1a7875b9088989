// The state file: companies as PostgreSQL has them, what WhatsApp knows of them, and the peers they talk with.
//   {version, companies: [{company_id, form, creds, keys, uploaded, conversations, groups, peers}]}
//   creds {stored, canonical}; keys [{key_type, key_id, stored, canonical}] (see Ledger)
//   uploaded {pre-key id: public key in base64} (see makeDevice)
//   conversations [{kind, peer, accountJid, migratesTo?, inFlight: [{type, ciphertext, data}]}]
//   groups [{group, accountJid, members: [jid], inFlight: [{author, ciphertext, data}]}]
//   peers {jid: {creds, keys}}
import { readFileSync, writeFileSync } from 'node:fs'
import { Ledger, makePeer } from './baileys.mjs'

export const folderOf = id => (id.startsWith('company_') ? id : `company_${id}`)

/** The file of a key: fixFileName of useMultiFileAuthState, over the whole name. */
export const fileOf = (type, id) => `${type}-${id}.json`.replace(/\//g, '__').replace(/:/g, '-')

export function writeFleet(baileys, file, companies) {
	const saved = companies.map(({ ledger, peers, ...company }) => ({
		...company,
		...ledger.toJSON(),
		peers: Object.fromEntries(Object.entries(peers).map(([jid, peer]) => [jid, savePeer(peer)]))
	}))
	writeFileSync(file, JSON.stringify({ version: baileys.version, companies: saved }, baileys.BufferJSON.replacer))
}

function savePeer({ ledger, creds }) {
	ledger.saveCreds(creds)
	return ledger.toJSON()
}

export function readFleet(baileys, file) {
	const { version, companies } = JSON.parse(readFileSync(file), baileys.BufferJSON.reviver)
	if (version !== baileys.version) throw new Error(`${file} was made with Baileys ${version}`)
	return companies.map(({ creds, keys, peers, ...company }) => ({
		...company,
		ledger: new Ledger(baileys, company.form, { creds, keys }),
		peers: Object.fromEntries(Object.entries(peers).map(([jid, saved]) => [jid, makePeer(baileys, jid, saved)]))
	}))
}
