// Make companies with live conversations, and save them as the rows their service would have in PostgreSQL.
//   node make_fleet.mjs --version 6|7 --out FILE [--accounts 3] [--pre-keys 60] [--form json-stringify|base64|mixed]
//                       [--folders DIR]   also the folders that Baileys' own useMultiFileAuthState writes
// FILE is the state that converse.mjs goes on from (its shape: fleet.mjs). 'mixed' takes the forms by turns.
import { randomBytes } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { Ledger, loadBaileys, makeDevice, makePeer, preKeyBundle, uploadPreKeys } from './baileys.mjs'
import { Direct, Group, encrypt, handOver, introduce, readInGroup, send, write } from './conversations.mjs'
import { folderOf, writeFleet } from './fleet.mjs'

const FORMS = ['mixed', 'json-stringify', 'base64']
const TOKEN_TIME = '1760000000' // seconds: any time at all, the same in each run
const COMPANY_IDS = ['962302', 'company_962303', 'acme-berlin'] // a number, the folder's own prefix, letters; then numbers

/** Pair with a phone of our own making, through Baileys' own code: it checks both signatures and adds the third. */
function pair({ Curve, configureSuccessfulPairing, hmacSign, proto }, creds, jid, lid) {
	const phone = Curve.generateKeyPair()
	const deviceDetails = proto.ADVDeviceIdentity.encode({ rawId: 1, timestamp: 1760000000, keyIndex: 1 }).finish()
	const signed = Buffer.concat([Buffer.from([6, 0]), deviceDetails, creds.signedIdentityKey.public])
	const details = proto.ADVSignedDeviceIdentity.encode({
		details: deviceDetails,
		accountSignatureKey: phone.public,
		accountSignature: Curve.sign(phone.private, signed)
	}).finish()
	const hmac = hmacSign(details, Buffer.from(creds.advSecretKey, 'base64'))
	const content = [
		{ tag: 'device-identity', attrs: {}, content: proto.ADVSignedDeviceIdentityHMAC.encode({ details, hmac }).finish() },
		{ tag: 'device', attrs: { jid, lid } },
		{ tag: 'platform', attrs: { name: 'android' } },
		{ tag: 'biz', attrs: { name: 'Müller & Söhne' } }
	]
	const stanza = { tag: 'iq', attrs: { id: '1' }, content: [{ tag: 'pair-success', attrs: {}, content }] }
	Object.assign(creds, configureSuccessfulPairing(stanza, creds).creds)
	creds.me.lid = lid // Baileys 6 learns it at login
}

/** Two keys and two collections, the second with contents: the hash and its index are Baileys' own. */
async function syncAppState({ encodeSyncdPatch, newLTHashState, proto }, { creds, keys }) {
	// A base64 id with the characters that file names cannot have.
	const ids = [Buffer.from([0xff, 0xff, 0xfe, 0, 1, 2]), Buffer.from([0, 0, 0, 0, 0xfb, 0xf0])].map(id => id.toString('base64'))
	for (const [index, id] of ids.entries()) {
		const keyData = proto.Message.AppStateSyncKeyData.create({
			keyData: randomBytes(32),
			fingerprint: { rawId: 1234 + index, currentIndex: index, deviceIndexes: [0, 1] },
			timestamp: 1760000000000
		})
		await keys.set({ 'app-state-sync-key': { [id]: keyData } })
	}
	creds.myAppStateKeyId = ids.at(-1)
	const keyOf = async id => (await keys.get('app-state-sync-key', [id]))[id]
	let state = newLTHashState()
	await keys.set({ 'app-state-sync-version': { critical_block: state } })
	for (const name of ['Anna', 'Bert']) {
		const action = {
			type: 'regular_low',
			index: ['contact', `${name}@s.whatsapp.net`],
			syncAction: { timestamp: 1760000000000, contactAction: { fullName: name } },
			apiVersion: 2,
			operation: proto.SyncdMutation.SyncdOperation.SET
		}
		state = (await encodeSyncdPatch(action, creds.myAppStateKeyId, state, keyOf)).state
	}
	await keys.set({ 'app-state-sync-version': { regular_low: state } })
}

/** What Baileys 7 stores beside: who has which lid, which devices, and the tokens of trusted contacts. */
async function knowContacts(baileys, { creds, keys, repository }, peers) {
	const { jidDecode, jidNormalizedUser, buildMergedTcTokenIndexWrite, storeTcTokensFromIqResult } = baileys
	const userOf = jid => jidDecode(jid).user
	const getLIDForPN = jid => repository.lidMapping.getLIDForPN(jid)
	await repository.lidMapping.storeLIDPNMappings([{ lid: creds.me.lid, pn: creds.me.id }])
	await keys.set({ 'device-list': { [userOf(creds.me.id)]: ['0', '5'] } })
	const tokenJids = []
	for (const { jid } of peers.filter(({ jid }) => jid.endsWith('@s.whatsapp.net'))) {
		await keys.set({ 'device-list': { [userOf(jid)]: ['0', String(jidDecode(jid).device ?? 3)] } })
		const token = { tag: 'token', attrs: { type: 'trusted_contact', jid, t: TOKEN_TIME }, content: randomBytes(12) }
		const result = { tag: 'iq', attrs: {}, content: [{ tag: 'tokens', attrs: {}, content: [token] }] }
		const fallbackJid = jidNormalizedUser(jid)
		await storeTcTokensFromIqResult({ result, fallbackJid, keys, getLIDForPN, onNewJidStored: id => tokenJids.push(id) })
	}
	// One that is kept for its time alone, under a device's lid: an id with a colon and a value of no bytes.
	const emptied = creds.me.lid
	await keys.set({ tctoken: { [emptied]: { token: Buffer.alloc(0), senderTimestamp: Number(TOKEN_TIME) } } })
	await keys.set({ tctoken: await buildMergedTcTokenIndexWrite(keys, [...tokenJids, emptied]) })
}

/** Let an author's sender key reach the account, as it does with the author's first message to a group. */
async function hearOf(account, group, author) {
	const message = await write(author, group, Buffer.from('hello'))
	await handOver(group, author.jid, message, account)
	await readInGroup(account, group, author.jid, message)
}

/** A message that WhatsApp still holds while a later one is there: its key waits in the account's session. */
async function holdBack(account, accountJid, peer) {
	const data = Buffer.from('held back')
	const message = await encrypt(peer, accountJid, data)
	await send(peer, peer.jid, account, accountJid, 'overtakes')
	return { ...message, data }
}

/** Baileys 7.0.0-rc14 can never read a group message that was overtaken, restored or not: there, nothing overtakes it. */
async function holdBackInGroup(account, group, author) {
	const { ciphertext, data } = await write(author, group, Buffer.from('held back'))
	if (account.baileys.version === 6) {
		await readInGroup(account, group, author.jid, await write(author, group, Buffer.from('overtakes')))
	}
	return { author: author.jid, ciphertext, data }
}

async function makeCompany(baileys, { index, form, preKeyCount }) {
	const number = String(index).padStart(4, '0')
	const [jid, lid] = [`49151000${number}:5@s.whatsapp.net`, `18070000${number}:5@lid`]
	const ledger = new Ledger(baileys, form)
	const creds = baileys.initAuthCreds()
	const account = makeDevice(baileys, creds, ledger.store())
	pair(baileys, creds, jid, lid)
	Object.assign(creds, {
		accountSyncCounter: 1,
		lastAccountSyncTimestamp: Number(TOKEN_TIME),
		lastPropHash: '1K7Yg',
		routingInfo: randomBytes(10),
		processedHistoryMessages: [{ key: { remoteJid: jid, fromMe: true, id: '3EB0' }, messageTimestamp: Number(TOKEN_TIME) }]
	})
	const preKeys = await uploadPreKeys(account, preKeyCount)
	await syncAppState(baileys, account)

	const peers = {}
	const conversations = []
	const meet = (kind, peerJid, { accountJid = jid, ...more } = {}) => {
		const peer = makePeer(baileys, peerJid)
		const conversation = { kind, peer: peerJid, accountJid, inFlight: [], ...more }
		peers[peerJid] = peer
		conversations.push(conversation)
		return { peer, conversation, direct: new Direct(account, accountJid, peer) }
	}
	const unused = Object.keys(preKeys).filter(id => id % 7 === 3) // consumed ones leave gaps
	const peerStarts = async ({ peer, conversation: { accountJid } }) => {
		const id = unused.shift()
		const session = preKeyBundle(baileys, creds, id, preKeys[id].public)
		await peer.repository.injectE2ESession({ jid: accountJid, session })
		await send(peer, peer.jid, account, accountJid, 'hello')
	}
	const accountStarts = async ({ peer, conversation: { accountJid } }) => {
		await introduce(account, peer, peer.jid)
		await send(account, accountJid, peer, peer.jid, 'our offer')
	}

	const both = meet('both ways', `49170${number}001@s.whatsapp.net`)
	await accountStarts(both)
	await both.direct.goOn()
	both.conversation.inFlight.push(await holdBack(account, jid, both.peer))

	const asked = meet('started by the peer', `49170${number}002:3@s.whatsapp.net`)
	await peerStarts(asked)
	await asked.direct.goOn()

	const received = meet('only received', `49170${number}003@s.whatsapp.net`)
	await peerStarts(received)
	await send(received.peer, received.peer.jid, account, jid, 'anybody there?')

	const sent = meet('only sent', `49170${number}004@s.whatsapp.net`)
	await accountStarts(sent)
	await send(account, jid, sent.peer, sent.peer.jid, 'still there?')

	const hidden = meet('by lid', `18090000${number}@lid`, { accountJid: lid })
	await peerStarts(hidden)
	await hidden.direct.goOn()

	if (baileys.version === 7) {
		const knownJid = `49170${number}005@s.whatsapp.net`
		await account.repository.lidMapping.storeLIDPNMappings([{ pn: knownJid, lid: `18091000${number}@lid` }])
		const known = meet('with a known lid', knownJid)
		await accountStarts(known)
		await known.direct.goOn()

		const moving = meet('moves to its lid', `49170${number}006@s.whatsapp.net`, { migratesTo: `18092000${number}@lid` })
		await peerStarts(moving)
		await moving.direct.goOn()
		await knowContacts(baileys, account, Object.values(peers))
	}

	const groups = []
	const ownJid = baileys.version === 7 ? lid : jid
	for (const [group, members] of [
		[`12036300000${number}@g.us`, [both.peer, asked.peer]],
		[`49151000${number}-1400000000@g.us`, [hidden.peer]],
		['status@broadcast', [both.peer]]
	]) {
		for (const member of members) await hearOf(account, group, member)
		const chat = new Group(account, ownJid, group, members)
		await chat.toMembers('hello all')
		await chat.toMembers('again')
		const inFlight = [await holdBackInGroup(account, group, members[0])]
		groups.push({ group, accountJid: ownJid, members: members.map(member => member.jid), inFlight })
	}

	ledger.saveCreds(creds)
	const company_id = COMPANY_IDS[index] ?? String(962302 + index)
	return { company_id, form, ledger, uploaded: account.uploaded, conversations, groups, peers }
}

async function writeFolder(baileys, root, { company_id, ledger }) {
	const { state, saveCreds } = await baileys.useMultiFileAuthState(join(root, folderOf(company_id)))
	Object.assign(state.creds, ledger.revive(ledger.creds.canonical))
	await saveCreds()
	for (const { key_type, key_id } of ledger.keys.values()) {
		await state.keys.set({ [key_type]: { [key_id]: ledger.read(key_type, key_id) } })
	}
}

const { values: options } = parseArgs({
	options: {
		version: { type: 'string' },
		out: { type: 'string' },
		accounts: { type: 'string', default: '3' },
		'pre-keys': { type: 'string', default: '60' },
		form: { type: 'string', default: 'mixed' },
		folders: { type: 'string' }
	}
})
if (!FORMS.includes(options.form)) throw new Error(`--form is one of ${FORMS.join(', ')}`)
const baileys = await loadBaileys(Number(options.version))
const companies = []
for (let index = 0; index < Number(options.accounts); index += 1) {
	const form = options.form === 'mixed' ? FORMS[index % FORMS.length] : options.form
	companies.push(await makeCompany(baileys, { index, form, preKeyCount: Number(options['pre-keys']) }))
}
writeFleet(baileys, options.out, companies)
if (options.folders) for (const company of companies) await writeFolder(baileys, options.folders, company)
