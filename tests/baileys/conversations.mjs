// Conversations between an account and its peers, over Baileys' own Signal repository: how they go on, and how they heal.
import assert from 'node:assert/strict'
import { freshBundle } from './baileys.mjs'

// After these errors WhatsApp's apps drop the message as a duplicate; after any other they ask for a retry.
const DUPLICATE = /Key used already|old counter/
const MOST_LOST_MESSAGES = 50

const text = what => Buffer.from(`${what} ${Math.random()}`)

export const encrypt = (from, toJid, data) => from.repository.encryptMessage({ jid: toJid, data })

export async function decrypt(to, fromJid, { type, ciphertext }, data) {
	assert.deepEqual(Buffer.from(await to.repository.decryptMessage({ jid: fromJid, type, ciphertext })), data)
}

/** Begin a conversation as Baileys does: fetch a pre-key bundle of the other device, and build a session on it. */
export async function introduce(from, to, toJid) {
	await from.repository.injectE2ESession({ jid: toJid, session: await freshBundle(to) })
}

export async function send(from, fromJid, to, toJid, what) {
	const data = text(what)
	await decrypt(to, fromJid, await encrypt(from, toJid, data), data)
}

/**
 * The account's side of a conversation with one peer.
 * Counts what a user would notice: `late` messages came only after a retry, `lost` ones never.
 * Without `mayHeal` the first trouble is the end, as an error.
 */
export class Direct {
	constructor(account, accountJid, peer, { mayHeal = false } = {}) {
		Object.assign(this, { account, accountJid, peer, mayHeal, late: 0, lost: 0, renewed: 0 })
	}

	get healed() {
		return this.late + this.lost + this.renewed > 0
	}

	async accountEncrypts(data) {
		try {
			return await encrypt(this.account, this.peer.jid, data)
		} catch (error) {
			if (!this.mayHeal) throw error
			this.renewed += 1 // Baileys asserts sessions before it sends: a missing one costs nothing
			await introduce(this.account, this.peer, this.peer.jid)
			return encrypt(this.account, this.peer.jid, data)
		}
	}

	async peerDecrypts(message, data) {
		try {
			await decrypt(this.peer, this.accountJid, message, data)
		} catch (error) {
			if (!this.mayHeal) throw error
			if (DUPLICATE.test(error.message)) {
				this.lost += 1
				return false
			}
			this.late += 1
			await introduce(this.account, this.peer, this.peer.jid)
			await decrypt(this.peer, this.accountJid, await encrypt(this.account, this.peer.jid, data), data)
		}
		return true
	}

	async accountDecrypts(message, data) {
		try {
			await decrypt(this.account, this.peer.jid, message, data)
		} catch (error) {
			if (!this.mayHeal) throw error
			this.late += 1
			await introduce(this.peer, this.account, this.accountJid)
			await decrypt(this.account, this.peer.jid, await encrypt(this.peer, this.accountJid, data), data)
		}
	}

	/** One message that arrives, however many are lost before it. */
	async toPeer(what) {
		for (let lost = 0; lost < MOST_LOST_MESSAGES; lost += 1) {
			const data = text(what)
			if (await this.peerDecrypts(await this.accountEncrypts(data), data)) return
		}
		throw new Error(`the peer has missed ${MOST_LOST_MESSAGES} messages in a row`)
	}

	async toAccount(what) {
		const data = text(what)
		await this.accountDecrypts(await encrypt(this.peer, this.accountJid, data), data)
	}

	/** Both sides write at once, then by turns: each needs its sending and its receiving chain, and new ratchet keys. */
	async goOn() {
		const [ours, theirs] = [text('ours'), text('theirs')]
		const [sent, coming] = [await this.accountEncrypts(ours), await encrypt(this.peer, this.accountJid, theirs)]
		await this.accountDecrypts(coming, theirs)
		if (!(await this.peerDecrypts(sent, ours))) await this.toPeer('and again')
		for (const what of ['one', 'two', 'three']) await this.toAccount(what)
		for (const what of ['four', 'five']) await this.toPeer(what)
	}
}

/** Sender keys: one chain per author of a group, handed to each member once, in a direct message. */
export class Group {
	constructor(account, accountJid, group, members, { mayHeal = false } = {}) {
		Object.assign(this, { account, accountJid, group, members, mayHeal, late: 0, lost: 0, renewed: 0 })
	}

	get healed() {
		return this.late + this.lost + this.renewed > 0
	}

	/** As in relayMessage of Baileys: the sender key goes to each member that sender-key-memory does not name. */
	async accountWrites(what) {
		const { keys, repository } = this.account
		const data = text(what)
		const message = await repository.encryptGroupMessage({ group: this.group, meId: this.accountJid, data })
		const memory = (await keys.get('sender-key-memory', [this.group]))[this.group] || {}
		for (const member of this.members.filter(({ jid }) => !memory[jid])) {
			await handOver(this.group, this.accountJid, message, member)
			memory[member.jid] = true
			this.renewed += 1
		}
		await keys.set({ 'sender-key-memory': { [this.group]: memory } })
		return { ...message, data }
	}

	/** @returns whether every member could read the message at once */
	async toMembers(what) {
		const message = await this.accountWrites(what)
		let waiting = false
		for (const member of this.members) {
			try {
				await readInGroup(member, this.group, this.accountJid, message)
			} catch (error) {
				if (!this.mayHeal) throw error
				waiting = true
				if (DUPLICATE.test(error.message)) this.lost += 1
				else {
					this.late += 1 // the member's retry receipt makes Baileys forget who has its sender key
					await this.account.keys.set({ 'sender-key-memory': { [this.group]: null } })
				}
			}
		}
		return !waiting
	}

	async accountReads(author, message) {
		try {
			await readInGroup(this.account, this.group, author.jid, message)
		} catch (error) {
			if (!this.mayHeal) throw error
			this.late += 1
			const again = await write(author, this.group, message.data)
			await handOver(this.group, author.jid, again, this.account)
			await readInGroup(this.account, this.group, author.jid, again)
		}
	}

	async goOn() {
		for (const author of this.members) await this.accountReads(author, await write(author, this.group, text('theirs')))
		for (let tries = 0; !(await this.toMembers('ours')); tries += 1) {
			if (tries === MOST_LOST_MESSAGES) throw new Error(`members missed ${MOST_LOST_MESSAGES} messages in a row`)
		}
		assert.ok(this.mayHeal || this.renewed === 0, 'sender-key-memory has forgotten a member')
		assert.ok(await this.toMembers('ours again'), 'a member cannot read the second message')
	}
}

export async function write(author, group, data) {
	return { ...(await author.repository.encryptGroupMessage({ group, meId: author.jid, data })), data }
}

export async function handOver(group, authorJid, { senderKeyDistributionMessage }, reader) {
	const item = { groupId: group, axolotlSenderKeyDistributionMessage: senderKeyDistributionMessage }
	await reader.repository.processSenderKeyDistributionMessage({ item, authorJid })
}

export async function readInGroup(reader, group, authorJid, { ciphertext, data }) {
	assert.deepEqual(Buffer.from(await reader.repository.decryptGroupMessage({ group, authorJid, msg: ciphertext })), data)
}
