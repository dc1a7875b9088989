// Log in with restored folders, as far as that goes without WhatsApp: compare every value with what was made, then go
// on with every conversation, both ways. Prints one JSON document; exit 0 only if all of it held.
//   {version, ok, companies: [{company_id, ok, error, mismatches: [{key_type, key_id, problem}],
//                              conversations: [{kind, with, outcome, error, late, lost}]}]}
//   node converse.mjs --version 6|7 --root DIR --state FILE
//     --company ID                       only this one (repeatable)
//     --expect-next-pre-key-raised 1000  creds as in a possibly stale copy
//     --may-heal                         for stale copies: mismatches are listed but forgiven, and so are conversations
//                                        that go on after retries; each one says what was late and what was lost
//     --live                             keep what Baileys writes: the folder is the service's from now on
//     --save-state FILE                  the state afterwards; without --live the folders become copies older than it
// Folders and state are only read otherwise, so one state can be gone on from many times.
import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { isDeepStrictEqual, parseArgs } from 'node:util'
import { loadBaileys, makeDevice, makePeer, preKeyBundle, uploadPreKeys } from './baileys.mjs'
import { Direct, Group, send } from './conversations.mjs'
import { fileOf, folderOf, readFleet, writeFleet } from './fleet.mjs'

/** Baileys' own folder state; unless `live`, what it writes goes to the ledger alone and shadows the folder. */
function keep(ledger, folderKeys, live) {
	const written = new Set()
	return {
		get: async (type, ids) => {
			const values = await folderKeys.get(type, ids)
			for (const id of ids) if (written.has(`${type}\n${id}`)) values[id] = ledger.read(type, id)
			return values
		},
		set: async data => {
			ledger.record(data)
			if (live) return folderKeys.set(data)
			for (const type in data) for (const id in data[type]) written.add(`${type}\n${id}`)
		}
	}
}

function expectedCreds(ledger, raisedBy) {
	const creds = ledger.revive(ledger.creds.canonical)
	if (raisedBy === undefined) return creds
	const ids = [...ledger.keys.values()].filter(row => row.key_type === 'pre-key').map(row => Number(row.key_id))
	const next = Math.max(creds.nextPreKeyId, creds.firstUnuploadedPreKeyId, Math.max(...ids) + 1) + raisedBy
	return { ...creds, nextPreKeyId: next, firstUnuploadedPreKeyId: next }
}

/** Every value of the company, as Baileys loads it from the folder, against what was made; and files that nobody made. */
async function findMismatches(folder, { creds, keys }, ledger, raisedBy) {
	const mismatches = []
	const expected = expectedCreds(ledger, raisedBy)
	for (const field of new Set([...Object.keys(expected), ...Object.keys(creds)])) {
		if (!isDeepStrictEqual(creds[field], expected[field])) mismatches.push({ key_type: null, key_id: field, problem: 'differs' })
	}
	const files = new Set(['creds.json'])
	for (const { key_type, key_id } of ledger.keys.values()) {
		files.add(fileOf(key_type, key_id))
		const value = (await keys.get(key_type, [key_id]))[key_id]
		if (value === null) mismatches.push({ key_type, key_id, problem: 'missing' })
		else if (!isDeepStrictEqual(value, ledger.read(key_type, key_id))) mismatches.push({ key_type, key_id, problem: 'differs' })
	}
	for (const file of readdirSync(folder)) {
		if (!file.startsWith('.') && !files.has(file)) mismatches.push({ key_type: null, key_id: file, problem: 'unexpected file' })
	}
	return mismatches
}

/** Run one conversation; whatever it throws is its result. */
async function tell(description, conversation, goOn) {
	const result = error => {
		const { late = 0, lost = 0, healed = false } = conversation ?? {}
		const outcome = error ? 'broken' : healed ? 'healed' : 'continued'
		return { ...description, outcome, error: error && `${error.name}: ${error.message}`, late, lost }
	}
	try {
		await goOn()
		return result(null)
	} catch (error) {
		return result(error)
	}
}

async function goOnDirectly(account, peers, conversation, mayHeal) {
	const peer = { ...peers[conversation.peer] }
	const direct = new Direct(account, conversation.accountJid, peer, { mayHeal })
	return tell({ kind: conversation.kind, with: peer.jid }, direct, async () => {
		if (conversation.migratesTo) {
			// What Baileys does when a message comes from the lid of a contact it knows by number.
			const { lidMapping, migrateSession } = account.repository
			await lidMapping.storeLIDPNMappings([{ pn: peer.jid, lid: conversation.migratesTo }])
			await migrateSession(peer.jid, conversation.migratesTo)
			peer.jid = conversation.migratesTo
		}
		for (const { data, ...message } of conversation.inFlight.splice(0)) await direct.accountDecrypts(message, data)
		await direct.goOn()
	})
}

async function goOnInGroup(account, peers, { group, accountJid, members, inFlight }, mayHeal) {
	const chat = new Group(account, accountJid, group, members.map(jid => peers[jid]), { mayHeal })
	return tell({ kind: 'group', with: group }, chat, async () => {
		for (const { author, ...message } of inFlight.splice(0)) await chat.accountReads(peers[author], message)
		await chat.goOn()
	})
}

/** Somebody new writes, with a bundle that WhatsApp put together from what the account uploaded; then it is a contact. */
async function meetSomebody(baileys, kind, { account, ledger, peers, conversations, accountJid }, takePreKey) {
	const peer = makePeer(baileys, `491600${String(Object.keys(peers).length).padStart(6, '0')}@s.whatsapp.net`)
	return tell({ kind, with: peer.jid }, null, async () => {
		const [id, publicKey] = await takePreKey()
		const session = preKeyBundle(baileys, ledger.revive(ledger.creds.canonical), id, publicKey)
		await peer.repository.injectE2ESession({ jid: accountJid, session })
		await send(peer, peer.jid, account, accountJid, 'hello')
		await new Direct(account, accountJid, peer).goOn()
		peers[peer.jid] = peer
		conversations.push({ kind, peer: peer.jid, accountJid, inFlight: [] })
	})
}

/** A pre-key uploaded before the copy was made, that nobody has used. */
function oldPreKey(ledger, uploaded) {
	const row = [...ledger.keys.values()].find(({ key_type, key_id }) => key_type === 'pre-key' && uploaded[key_id])
	return [row.key_id, Buffer.from(uploaded[row.key_id], 'base64')]
}

/** The next pre-keys that Baileys uploads: no id of theirs, or of a retry before, may ever have been used. */
async function newPreKey(account) {
	const [id, pair] = Object.entries(await uploadPreKeys(account, 5)).at(-1)
	if (account.usedAgain.length) throw new Error(`pre-keys used again with other keys: ${account.usedAgain.join(', ')}`)
	return [id, pair.public]
}

async function goOnWithCompany(baileys, company, { root, live, mayHeal, raisedBy }) {
	const { company_id, ledger, peers, conversations, groups, uploaded } = company
	const folder = join(root, folderOf(company_id))
	// Baileys would make the folder, and a new identity in it.
	if (!existsSync(folder)) return { company_id, ok: false, mismatches: [], conversations: [], error: 'no folder' }
	const { state, saveCreds } = await baileys.useMultiFileAuthState(folder)
	const mismatches = await findMismatches(folder, state, ledger, raisedBy)
	const account = makeDevice(baileys, state.creds, keep(ledger, state.keys, live), uploaded)
	const known = { account, ledger, peers, conversations, accountJid: ledger.revive(ledger.creds.canonical).me.id }

	const results = []
	for (const conversation of conversations) results.push(await goOnDirectly(account, peers, conversation, mayHeal))
	for (const group of groups) results.push(await goOnInGroup(account, peers, group, mayHeal))
	results.push(await meetSomebody(baileys, 'new peer, old pre-key', known, async () => oldPreKey(ledger, uploaded)))
	results.push(await meetSomebody(baileys, 'new peer, new pre-key', known, () => newPreKey(account)))

	ledger.saveCreds(state.creds)
	if (live) await saveCreds()
	const ok = (mayHeal || mismatches.length === 0) && results.every(({ outcome }) => outcome !== 'broken')
	return { company_id, ok, mismatches, conversations: results, error: null }
}

const { values: options } = parseArgs({
	options: {
		version: { type: 'string' },
		root: { type: 'string' },
		state: { type: 'string' },
		company: { type: 'string', multiple: true },
		'expect-next-pre-key-raised': { type: 'string' },
		'may-heal': { type: 'boolean', default: false },
		live: { type: 'boolean', default: false },
		'save-state': { type: 'string' }
	}
})
const raised = options['expect-next-pre-key-raised']
const baileys = await loadBaileys(Number(options.version))
const fleet = readFleet(baileys, options.state)
const chosen = fleet.filter(({ company_id }) => options.company?.includes(company_id) ?? true)
const report = { version: baileys.version, ok: chosen.length > 0, companies: [] }
for (const company of chosen) {
	const result = await goOnWithCompany(baileys, company, {
		root: options.root,
		live: options.live,
		mayHeal: options['may-heal'],
		raisedBy: raised === undefined ? undefined : Number(raised)
	})
	report.companies.push(result)
	report.ok &&= result.ok
}
if (options['save-state']) writeFleet(baileys, options['save-state'], fleet)
process.stdout.write(`${JSON.stringify(report, null, 1)}\n`)
process.exitCode = report.ok ? 0 : 1
