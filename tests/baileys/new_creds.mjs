// What the service writes when it finds no credentials: node new_creds.mjs --version=6|7 prints them as plain JSON.
import { parseArgs } from 'node:util'
import { loadBaileys } from './baileys.mjs'

const { values } = parseArgs({ options: { version: { type: 'string' } } })
const { initAuthCreds } = await loadBaileys(Number(values.version))
process.stdout.write(JSON.stringify(initAuthCreds()))
